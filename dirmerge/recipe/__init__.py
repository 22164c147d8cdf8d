"""Recipes: mergekit's YAML schema and our keys, checked as a whole."""

from dirmerge.recipe.align import AlignSection, AlignTask, LearnOptions
from dirmerge.recipe.loading import load_recipe
from dirmerge.recipe.schema import ModelEntry, Recipe, TensorRule, is_inline_template
from dirmerge.recipe.settings import ModelRef, Setting, parse_setting, parse_size

__all__ = [
    "AlignSection",
    "AlignTask",
    "LearnOptions",
    "ModelEntry",
    "ModelRef",
    "Recipe",
    "Setting",
    "TensorRule",
    "is_inline_template",
    "load_recipe",
    "parse_setting",
    "parse_size",
]
