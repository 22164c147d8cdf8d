"""What adapter_config.json may say: options that mean plain LoRA; everything else is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dirmerge.errors import CheckpointError

# What PEFT puts before the base model's tensor names.
PREFIX = "base_model.model."
# Options that say how an adapter was trained or where it was put; the tensors hold all that matters.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "alpha_pattern", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Options under which the weight is not W + c·B A, by name, with what a message calls them.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "ensure_weight_tying": "LoRA on tied weights (ensure_weight_tying)",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on lora_B (lora_bias)",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on parameters such as fused experts (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
MERGE_FIRST = (
    "merge it into its base model with PEFT (merge_and_unload, then save_pretrained) and give that full "
    "model instead"
)
# Initialisations that leave the base weights as they are.
_PLAIN_INITS = {"eva", "gaussian", "mica", "orthogonal"}


def refused(path: Path, what: str) -> CheckpointError:
    """Returns the error for an adapter that uses something other than plain LoRA."""
    return CheckpointError(f"{path}: uses {what}, which is not a plain low-rank update; {MERGE_FIRST}")


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raises unless the options mean plain LoRA."""
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"{path}: peft_type must be LORA, got {kind!r}; {MERGE_FIRST}")
    for name, value in config.items():
        if name in HARMLESS or not value:
            continue
        if name in REFUSED:
            raise refused(path, REFUSED[name])
        raise CheckpointError(
            f"{path}: has the option {name} = {value!r}, which dirmerge does not know (adapter of a newer "
            f"PEFT?); {MERGE_FIRST}"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise CheckpointError(
            f"{path}: was initialised by {init!r}, which changes the base weights, so its factors are no "
            "update of the original base. Convert it with PEFT (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {MERGE_FIRST}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {name} must be an object")
        for pattern in patterns:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}: {name} has the invalid pattern {pattern!r}: {error}"
                ) from error
    for name in ("use_rslora", "fan_in_fan_out"):
        if config.get(name) not in (None, True, False):
            raise CheckpointError(f"{path}: {name} must be true or false, got {config[name]!r}")
    base_name = config.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path must be a string")


def module_value(config: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """Returns the module's value: the first pattern in the file that matches, as when PEFT loads it."""
    table = config.get(patterns) or {}
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    # PEFT's defaults are 8 for both.
    return table.get(module, config.get(default, 8))
