"""Readers of features: the input of a classifier's last layer, poolings of encoders, CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dirmerge.alignment.heads import Head
from dirmerge.alignment.model import Batch, Model

# Where transformers keeps the last linear layer of its sequence- and image-classification models.
_CLASSIFIERS = ("classifier", "score", "fc", "head", "classification_head", "sequence_summary")


class LastLayerInput:
    """Reads what goes into a model's last linear layer; of a sequence, at its last real token.

    Decoders classify every position and take the last one that the attention mask keeps; so does this.

    Args:
        path: the layer's dotted name in the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """(n, d) features of one batch."""
        caught: list[Tensor] = []
        layer = model.module.get_submodule(self.path)
        handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            model.run(batch)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ValueError(f"{self.path} must run once per batch, it ran {len(caught)} times")
        return _last_token(caught[0], batch)


def _last_token(z: Tensor, batch: Batch) -> Tensor:
    if z.ndim != 3:
        return z
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return z[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    return z[torch.arange(z.shape[0], device=z.device), (mask * positions).argmax(1)]


class Pooled:
    """Reads an encoder's pooled output.

    Args:
        how: `mean` of the last hidden states over the attention mask, the state of the first token (`cls`),
            or the name of an output of the model such as `pooler_output`, `image_embeds`, `text_embeds`.
    """

    def __init__(self, how: str = "mean") -> None:
        self.how = how

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """(n, d) features of one batch."""
        output = model.run(batch)
        if self.how not in ("mean", "cls"):
            value = getattr(output, self.how, None)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{type(model.module).__name__} gives no {self.how!r}, only {', '.join(output.keys())}"
                )
            return value
        hidden: Tensor = output.last_hidden_state
        if self.how == "cls":
            return hidden[:, 0]
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is None:
            return hidden.mean(1)
        weights = mask.unsqueeze(-1).to(hidden)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean


def classifier(module: torch.nn.Module) -> tuple[LastLayerInput, Head]:
    """Returns the feature reader and the head of a transformers sequence- or image-classification model.

    Args:
        module: a model whose last layer is linear, as those of AutoModelForSequenceClassification and
            AutoModelForImageClassification; a dropout before it must be off (evaluation mode).

    Raises:
        ValueError: no last linear layer is found; read the features by a function of your own then.
    """
    path = last_linear(module)
    layer = module.get_submodule(path)
    return LastLayerInput(path), Head.of_linear(layer, _labels(module, layer))


def last_linear(module: torch.nn.Module) -> str:
    """Returns the dotted name of the linear layer that makes the logits."""
    for name in _CLASSIFIERS:
        part = getattr(module, name, None)
        if isinstance(part, torch.nn.Module):
            found = [path for path, child in part.named_modules() if isinstance(child, torch.nn.Linear)]
            if found:
                return f"{name}.{found[-1]}" if found[-1] else name
    raise ValueError(
        f"{type(module).__name__} has no linear layer under {', '.join(_CLASSIFIERS)}; give `features` and "
        "`head` of your own"
    )


def _labels(module: torch.nn.Module, layer: torch.nn.Module) -> tuple[str, ...]:
    names: Any = getattr(getattr(module, "config", None), "id2label", None)
    size = int(getattr(layer, "out_features", 0))
    if not isinstance(names, Mapping) or len(names) != size:
        return ()
    return tuple(str(names[i]) for i in range(size)) if all(i in names for i in range(size)) else ()
