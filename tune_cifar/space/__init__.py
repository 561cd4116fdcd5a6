"""Search spaces: a YAML file in, a baseline, Optuna distributions and a budget out.

Every refusal happens here, before anything is trained, and names file, line and rule. `document` reads YAML strictly,
`layout` says what a file holds, `rules` asks the schema, `reader` checks a file, `select` takes one tier of it with a
command line's pins; `edit` writes a range into a file, `knobs` tells what there is to set. Only `select` needs Optuna,
and only while it builds distributions: listing spaces stays quick.
"""
