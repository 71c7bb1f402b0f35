"""Losses and their targets: self-distillation, labels, pseudo-labels, knowledge distillation, fits of the class head."""
