"""Which model families can be audited, and the proof: `auditgap ls families`, `make families`.

`building` makes a tiny model of a family by `settings.yaml`, `proof` compares the engine on it with
transformers' own model, `table` keeps the answers.
"""
