"""The gate and its statistics: AUC, calibration, verdict, raw-pixel baseline. Must not import torch in gate, verdict, auc, label_table, floor, forgetting, pixel_baseline."""
