"""Search spaces: from a YAML file to a baseline, Optuna distributions and a budget.

Every rule of a file is checked here, before anything is trained; errors name file, line and rule.
`document` reads YAML strictly, `layout` says what a file holds, `rules` asks the schema, `reader`
checks a file and changes a range in it, `select` takes one tier of it with a command line's pins,
`template` writes a file to start from, `overview` lists what can be set. Only `select` needs
Optuna, and only to build distributions, so listing spaces stays fast.
"""
