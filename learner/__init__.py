"""The learner: a round folder in, the parts of a model bundle out.

It knows no DICOM, no ledger and no server; it reads plates and a manifest, and writes only inside its round folder.
`recipe`, `round_dir`, `gate` and `floor` import neither torch nor timm, so that the agent may use them.
"""
