"""Networks: backbones, heads, their architecture and initial weights."""
