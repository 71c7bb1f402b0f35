"""Losses and targets: self-distillation, pseudo-labels, correction, head fits."""
