"""Zero-shot classifiers of open_clip and transformers: the logits of the libraries for the classes' texts."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.models import load_model

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
TEXTS = ["a photo of a cat.", "a photo of a red fox.", "a photo of a dog."]
IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """Register a small architecture of open_clip."""
    open_clip = pytest.importorskip("open_clip")
    body = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(body))
    open_clip.add_model_config(path)
    return open_clip


def normalised(images, mean, std):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - mean) / std


def test_a_model_of_open_clip_gives_the_cosines_of_images_and_texts(architecture, tmp_path, monkeypatch):
    torch.manual_seed(1)
    net = architecture.create_model("tiny-clip").eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    (tmp_path / "names.txt").write_text("cat\nred fox\ndog\n")
    with torch.no_grad():
        images = net.encode_image(normalised(IMAGES, net.visual.image_mean, net.visual.image_std), normalize=True)
        texts = net.encode_text(architecture.get_tokenizer("tiny-clip")(TEXTS), normalize=True)
        wanted = net.logit_scale.exp() * images @ texts.T
    for classes in ("cat,red fox,dog", tmp_path / "names.txt"):
        model = load_model(f"clip:tiny-clip@{tmp_path}/w.pt?classes={classes}")
        torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.chdir(tmp_path)
    assert load_model(f"clip:tiny-clip@{tmp_path}/w.pt?classes=names.txt").string == model.string
    assert model.class_names == ("cat", "red fox", "dog")
    assert load_model(model.string).fingerprint == model.fingerprint
    other = load_model(f"clip:tiny-clip@{tmp_path}/w.pt?classes={classes}&template={{}}, drawn")
    assert other.fingerprint != model.fingerprint
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("string", "sentence"),
    [
        ("clip:tiny-clip?classes=a,b", "is written without the weights that are meant"),
        ("clip:ViT-B-32?classes=a,b", "write one of ViT-B-32/"),
        (
            "clip:ViT-B-32/opnai?classes=a,b",
            r"has no weights 'opnai': did you mean 'openai'\?; write one of ViT-B-32/",
        ),
        ("clip:tiny-clup?classes=a,b", "did you mean 'tiny-clip'"),
        ("clip:tiny-clip", "names 0 classes: write two or more"),
        ("clip:tiny-clip?classes=a,b&template=photo", "has no place for the class"),
        ("clip:tiny-clip?class=a,b", "field of clip models"),
        ("clip:./none?classes=a,b", "there is no folder"),
    ],
)
def test_an_impossible_string_is_refused(architecture, string, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_model(string)


def test_missing_open_clip_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match="needs open_clip: pip install open_clip_torch"):
        load_model("clip:ViT-B-32/openai?classes=a,b")


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz."
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        **small,
        "vocab_size": len(pieces),
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(2)
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "image_mean": MEAN,
        "image_std": STD,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def test_a_folder_of_transformers_gives_the_logits_of_its_model(folder):
    import transformers

    model = load_model(f"clip:{folder}?classes=cat,red fox,dog")
    net = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    wanted = net(pixel_values=normalised(IMAGES, MEAN, STD), **tokens).logits_per_image
    torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    assert load_model(model.string).fingerprint == model.fingerprint
