"""Transformers' Conv1D, the linear layer of GPT-2, whose weight is stored in×out. Imported only when one is met."""

from transformers.pytorch_utils import Conv1D

from cola.lora.layer import AdaptedLayer


class LoRAConv1D(AdaptedLayer, Conv1D):
    """A transformers Conv1D with a link."""

    plain_class = Conv1D
    transposed = True
