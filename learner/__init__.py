"""The learner: reads a round folder (plates and a manifest), trains, and writes the parts of a model bundle into it.

Must not import the agent, dicom or deploy. `round.recipe`, `round.manifest`, `round.folder`, `round.metrics_log`,
`errors`, `evaluation.gate` and `evaluation.pixel_baseline` import neither torch nor timm, because the agent uses them.
"""
