"""Choosing by evidence: measuring calls, keeping the figures, checking answers. Nothing here runs unasked.

`calls` says what to measure and `presets` what models ask for; `candidates` who may serve, `timing` and `ceiling` how
long it takes and how long it would have to; `accuracy` whether the answer is right. `measuring` puts them together for
`bench` (tables, files, plots) and `tuning` (the policy file of this machine, kept by `store`).
"""
