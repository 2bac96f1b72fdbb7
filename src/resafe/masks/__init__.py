"""The safety mask: concrete distribution, masked modules, training loop, file format."""

from resafe.masks.batches import encode_items
from resafe.masks.concrete import MaskSettings, export_mask
from resafe.masks.format import Mask
from resafe.masks.install import install_masks
from resafe.masks.logits import MaskLogits
from resafe.masks.losses import Encoded, answer_log_probabilities, preference_loss
from resafe.masks.presets import PRESETS, MaskPreset
from resafe.masks.stored import StoredMask
from resafe.masks.train import MaskTrainer, TrainSettings

__all__ = [
    "PRESETS",
    "Encoded",
    "Mask",
    "MaskLogits",
    "MaskPreset",
    "MaskSettings",
    "MaskTrainer",
    "StoredMask",
    "TrainSettings",
    "answer_log_probabilities",
    "encode_items",
    "export_mask",
    "install_masks",
    "preference_loss",
]
