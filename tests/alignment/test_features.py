from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dirmerge.alignment import Model, Pooled, classifier
from dirmerge.alignment.data import make_batches, read_inputs
from dirmerge.alignment.features import last_linear
from dirmerge.errors import CheckpointError, RecipeError

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def texts(pad):
    tokens = torch.randint(3, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    for row, length in enumerate((7, 4, 5)):
        tokens[row, length:], mask[row, length:] = pad, 0
    return {"input_ids": tokens, "attention_mask": mask}


def build(name):
    torch.manual_seed(0)
    words = {"vocab_size": 32, "num_labels": 3, "initializer_range": 0.5, "pad_token_id": 1}
    if name == "vit":
        config = transformers.ViTConfig(
            **SMALL, image_size=8, patch_size=4, num_labels=3, initializer_range=0.5
        )
        images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return transformers.ViTForImageClassification(config), {"pixel_values": images}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **words)
        return transformers.GPT2ForSequenceClassification(config), texts(1)
    if name == "llama":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, **words)), texts(
            1
        )
    kind = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[name]
    sizes = SMALL if name != "distilbert" else {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    config = getattr(transformers, f"{kind}Config")(**sizes, **words)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config), texts(1)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bert", "classifier"),
        ("roberta", "classifier.out_proj"),
        ("distilbert", "classifier"),
        ("gpt2", "score"),
        ("llama", "score"),
        ("vit", "classifier"),
    ],
)
def test_head_of_the_features_gives_the_models_logits(name, path):
    module, batch = build(name)
    module.eval()
    assert last_linear(module) == path
    reader, head = classifier(module)
    with torch.no_grad():
        z = reader(Model(module), batch)
        torch.testing.assert_close(head(z), module(**batch).logits, rtol=1e-4, atol=1e-5)
        # With other weights than its own, and without leaving a hook behind.
        weights = {name: value * 1.1 for name, value in module.named_parameters()}
        turned = reader(Model(module, weights), batch)
    assert z.shape == (3, 16)
    assert (turned - z).norm() > 1e-3 * z.norm()
    assert not module.get_submodule(path)._forward_pre_hooks


def test_poolings_ignore_padding():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=32, initializer_range=0.5)
    module = transformers.BertModel(config).eval()
    batch = texts(0)
    with torch.no_grad():
        hidden = module(**batch).last_hidden_state
        mean = Pooled("mean")(Model(module), batch)
        torch.testing.assert_close(mean[1], hidden[1, :4].mean(0))
        torch.testing.assert_close(Pooled("cls")(Model(module), batch), hidden[:, 0])
        pooler = Pooled("pooler_output")(Model(module), batch)
        torch.testing.assert_close(pooler, module(**batch).pooler_output)
        with pytest.raises(ValueError, match="BertModel gives no 'image_embeds', only last_hidden_state"):
            Pooled("image_embeds")(Model(module), batch)


def test_a_module_without_a_last_linear_layer():
    with pytest.raises(ValueError, match="Tanh has no linear layer"):
        classifier(torch.nn.Tanh())


def test_image_folders_and_parquet(tmp_path):
    pytest.importorskip("datasets")
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "images" / label / f"{i}.png")
    images, found = read_inputs(str(tmp_path / "images"), None, 5, 0)
    assert found
    assert len(images) == 5
    assert {image.size for image in images} == {(8, 8)}
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "model")
    batches: Any = make_batches(images, True, tmp_path / "model", 2, 16)
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1]
    with pytest.raises(CheckpointError, match="model: has no tokenizer"):
        make_batches(["a"], False, tmp_path / "model", 2, 16)

    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"text": [f"text {i}" for i in range(20)], "label": [0] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    drawn, found = read_inputs(str(tmp_path / "t.parquet"), None, 8, 0)
    assert not found
    assert len(set(drawn)) == 8
    assert drawn == read_inputs(str(tmp_path / "t.parquet"), None, 8, 0)[0]
    assert drawn != read_inputs(str(tmp_path / "t.parquet"), None, 8, 1)[0]
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}))
    with pytest.raises(RecipeError, match=r"empty\.jsonl: column 'text' must hold texts or images"):
        read_inputs(str(tmp_path / "empty.jsonl"), None, 8, 0)
    (tmp_path / "t.xlsx").write_text("x")
    with pytest.raises(CheckpointError, match=r"t\.xlsx: must be a folder of images or one of \.csv"):
        read_inputs(str(tmp_path / "t.xlsx"), None, 8, 0)
