"""By what the best of many candidates is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from latticode.core.types import Conditioning
from latticode.sampling.scores import LabelScore, clip_pixels, clip_score, load_clip

LABELS = Conditioning(torch.tensor([0, 2, 1]))


def test_a_classifier_scores_by_the_probability_of_the_label():
    def classifier(images: Tensor) -> Tensor:
        assert torch.equal((images + 1) * 127.5, ((images + 1) * 127.5).round()), "8-bit images"
        return images.mean((1, 2, 3))[:, None] * torch.tensor([0.0, 1.0, -1.0])

    images = torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    scores = LabelScore(classifier)(images, LABELS)
    p = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    torch.testing.assert_close(scores, torch.stack([p[0], p[2], p[1]]))
    for cond in (Conditioning(), Conditioning(torch.tensor([0, -1, 0]))):
        with pytest.raises(ValueError, match="a label was asked of, and there is none"):
            LabelScore(classifier)(images, cond)


def test_clip_sees_the_centre_in_its_own_scale():
    images = torch.zeros(1, 1, 4, 8)
    images[..., :2], images[..., 6:] = -1, 1  # is cut off
    pixels = clip_pixels(images, 4)
    assert pixels.shape == (1, 3, 4, 4)
    grey = torch.tensor(
        [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.5 - 0.40821073) / 0.27577711]
    )
    torch.testing.assert_close(pixels, grey.view(1, 3, 1, 1).expand(1, 3, 4, 4))
    assert clip_pixels(torch.rand(2, 3, 7, 5), 10).shape == (2, 3, 10, 10)
    assert clip_pixels(torch.rand(2, 3, 40, 30), 8).shape == (2, 3, 8, 8)


class Clip(nn.Module):
    """Answers like a `CLIPModel` whose embeddings are the pixels' means and the tokens."""

    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=4))
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(image_embeds=pixel_values.mean((2, 3)), text_embeds=input_ids)


def test_clip_scores_by_the_cosine():
    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1.0, 0.0, 0.0] if text == "red" else [0.0, 0.0, 3.0] for text in texts])}

    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    score = clip_score(Clip(), tokenize)
    right, wrong = score(red, Conditioning(texts=("red", "blue")))
    mean = clip_pixels(red[:1], 4).mean((2, 3))[0]
    torch.testing.assert_close(right, mean[0] / mean.norm())
    assert wrong < 0 < right
    with pytest.raises(ValueError, match="a text was asked of, and there is none"):
        score(red, Conditioning(texts=("red", "")))


def test_clip_of_transformers():
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 40},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    score = clip_score(transformers.CLIPModel(config).eval(), lambda texts: {"input_ids": torch.full((2, 3), 39)})
    scores = score(torch.rand(2, 3, 20, 16), Conditioning(texts=("a", "b")))
    assert scores.shape == (2,)
    assert (scores.abs() <= 1).all()


def test_what_is_no_clip(tmp_path):
    try:
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"CLIP needs transformers.*latticode\[text\]"):
            load_clip(str(tmp_path))
    else:
        with pytest.raises(ValueError, match="could not be loaded"):
            load_clip(str(tmp_path))
