"""Tables in, figures out; nothing is computed here. A file per kind of figure; `style` is what they share."""
