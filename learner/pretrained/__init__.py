"""Pretrained weights: read a file or a model of the hub, tell its family, keep its lower blocks."""
