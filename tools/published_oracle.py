"""Ask the published DeepThinkVLA code for the numbers that ``tests/policy/test_fidelity.py`` compares with.

Run by hand, in an environment of its own, because the published code needs transformers 4.48.1::

    uv venv --python 3.12 /tmp/published
    uv pip install --python /tmp/published/bin/python torch==2.11.0 torchvision==0.26.0 numpy==2.2.6 \
        transformers==4.48.1 safetensors
    git clone https://github.com/wadeKeith/DeepThinkVLA /tmp/DeepThinkVLA   # commit ef0aaad
    /tmp/published/bin/python tools/published_oracle.py /tmp/DeepThinkVLA

It writes ``tests/policy/published/answers.npz``. Model, dataset, collator and action tokenizer are the published ones,
the processor is transformers'; inputs and weights come from ``tests/policy/published/recipe.py``. The published code
casts to float32 in places whatever the model's type: here ``Tensor.float`` leaves float64 alone, Gemma's rotary table
is computed in float64, and pixels are the processor's formula in float64.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).resolve().parents[1] / "tests/policy/published"
sys.path.insert(0, str(FIXTURE))
import recipe  # noqa: E402

OBSERVATIONS = 100  # the most that are tried for the wanted decisions


def main() -> None:
    """Write the answers of the published code at the path of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a checkout of the published repository")
    parser.add_argument("--output", type=Path, default=FIXTURE / "answers.npz")
    arguments = parser.parse_args()
    stay_in_float64()
    published = PublishedCode(arguments.repository / "src")
    answers: dict[str, Any] = {}
    answers |= {"names": np.array(list(published.shapes)), "shapes": padded(list(published.shapes.values()))}
    answers |= published.training() | published.decisions() | published.table()
    np.savez_compressed(arguments.output, **answers)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")


def stay_in_float64() -> None:
    """Let float64 models compute in float64 throughout."""
    from transformers.models.gemma import modeling_gemma

    original = Tensor.float
    Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else original(self, *a, **k)  # type: ignore[method-assign]

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        angle = position_ids[..., None].double() * self.config.rope_theta**-half
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    modeling_gemma.GemmaRotaryEmbedding.forward = rotary


def padded(rows: list[Any], value: int = -1) -> np.ndarray:
    """Integer rows of unequal length as one array."""
    width = max(len(row) for row in rows)
    return np.array([[*row, *[value] * (width - len(row))] for row in rows], dtype=np.int64)


class PublishedCode:
    """The published model with the recipe's weights, its processor and its data set."""

    def __init__(self, source: Path) -> None:
        """Import the published modules from a folder and build everything."""
        sys.path.insert(0, str(source))
        sys.argv = ["libero"]  # the published constants look for the robot's name here
        for name in ("lerobot", "lerobot.common", "lerobot.common.datasets", "lerobot.common.datasets.lerobot_dataset"):
            sys.modules[name] = types.ModuleType(name)  # reads files; the samples here come from the recipe
        reader: Any = sys.modules["lerobot.common.datasets.lerobot_dataset"]
        reader.LeRobotDataset = reader.LeRobotDatasetMetadata = None
        package = types.ModuleType("sft")  # its own __init__ imports the trainer
        package.__path__ = [str(source / "sft")]
        sys.modules["sft"] = package
        from transformers import GemmaTokenizerFast, PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

        model_class = importlib.import_module("sft.modeling_deepthinkvla").DeepThinkVLA
        self.data = importlib.import_module("dt_datasets.dataset")
        self.model = model_class(PaliGemmaConfig(**recipe.CONFIG)).double().eval()
        tied = "language_model.lm_head.weight"
        self.shapes = {name: tuple(p.shape) for name, p in self.model.state_dict().items() if name != tied}
        problems = self.model.load_state_dict(recipe.weights(self.shapes), strict=False)
        assert (problems.missing_keys, problems.unexpected_keys) == ([tied], []), problems
        images = SiglipImageProcessor(size={"height": recipe.IMAGE_SIZE, "width": recipe.IMAGE_SIZE})
        images.image_seq_length = recipe.CONFIG["vision_config"]["num_image_tokens"]
        with tempfile.TemporaryDirectory() as folder:
            recipe.tokenizer().save(f"{folder}/tokenizer.json")
            text = GemmaTokenizerFast.from_pretrained(folder)
        self.processor = PaliGemmaProcessor(images, text)
        assert (text.vocab_size, len(text)) == (recipe.BASE, recipe.BASE + 5), (text.vocab_size, len(text))
        self.tokenizer = importlib.import_module("dt_datasets.action_tokenizer").ActionTokenizer(text)
        normalize, constants = (importlib.import_module(m) for m in ("dt_datasets.normalize", "sft.constants"))
        values = {name: np.array(values) for name, values in recipe.statistics()["action"].items()}
        how = (constants.ACTION_PROPRIO_NORMALIZATION_TYPE, values, constants.ACTION_MASK)
        self.normalize, self.unnormalize = normalize.Normalize_Action(*how), normalize.Unnormalize_Action(*how)

    def training(self) -> dict[str, Any]:
        """Sequences, losses, logits, masks and gradients of training samples, one by one and as a padded batch."""
        samples = [self.sample(index) for index in range(len(recipe.THOUGHTS))]
        collate = self.data.PadDataCollator(self.processor.tokenizer, ignore_index=-100)
        answers = {}
        for index, sample in enumerate(samples):
            answers |= {f"{name}_{index}": value for name, value in self.scored(collate([sample])).items()}
        padded = self.scored(collate([samples[index] for index in recipe.BATCH]))
        return answers | {f"{name}_batch": value for name, value in padded.items()}

    def sample(self, index: int) -> dict[str, Tensor]:
        """One item of the published data set, without augmentation."""
        data_set = object.__new__(self.data.LiberoDataset)
        data_set.processor, data_set.action_tokenizer, data_set.use_wrist_image = self.processor, self.tokenizer, True
        data_set.dataset_flag, data_set.data_args = "test", types.SimpleNamespace(reasoning_dropout=0.0)
        data_set.normalize_action = self.normalize
        pictures = torch.from_numpy(recipe.pictures(index)).permute(0, 3, 1, 2) / 255
        ids = self.processor.tokenizer.encode(recipe.THOUGHTS[index], add_special_tokens=False)
        item = {
            "observation.images.image": pictures[0],
            "observation.images.wrist_image": pictures[1],
            "action": torch.from_numpy(recipe.actions(index)),
            "reasoning": torch.tensor(ids + [self.processor.tokenizer.pad_token_id] * (60 - len(ids))),
            "task": recipe.TASKS[index],
        }
        data_set.dataset = [item]
        sample = data_set[0]
        sample["pixel_values"] = exact_pixels(recipe.pictures(index), sample["pixel_values"])
        return sample

    def scored(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Loss, gradient, the logits that predict something, and the mask."""
        self.model.zero_grad()
        output = self.model(**batch)
        output.loss.backward()
        ids, length = batch["input_ids"], batch["input_ids"].shape[1]
        start = [int((row == recipe.ACTION_START).nonzero()[-1]) for row in ids]
        mask = self.model._update_causal_mask(
            batch["attention_mask"],
            batch["token_type_ids"],
            None,
            torch.arange(length),
            ids,
            None,
            True,
            torch.tensor(start),
        )
        named = {name: p.grad for name, p in self.model.named_parameters() if "lm_head" not in name}
        assert set(named) == set(self.shapes)
        return {
            "loss": output.loss.item(),
            "input_ids": ids.numpy(),
            "token_type_ids": batch["token_type_ids"].numpy(),
            "labels": batch["labels"].numpy(),
            "mask": np.packbits((mask[:, 0] == 0).numpy()),
            "gradient": recipe.projections(named),
            **recipe.summary(output.logits[:, :-1][batch["labels"][:, 1:] != -100].detach(), recipe.token_columns()),
        }

    @torch.no_grad()
    def decisions(self) -> dict[str, Any]:
        """Decoded thoughts and chosen actions of observations, the first ones of every wanted kind."""
        from transformers import GenerationConfig

        settings = {"do_sample": False, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None, "num_beams": 1}
        generation = GenerationConfig(max_new_tokens=recipe.CAP, use_cache=True, **settings)
        found: dict[str, list[int]] = {"ended": [], "capped": []}
        answers: dict[str, Any] = {}
        for index in range(100, 100 + OBSERVATIONS):
            inputs = self.observation(index)
            chosen, ids = self.model.predict_cot_action(**inputs, generation_config=generation)
            thought = ids[0, inputs["input_ids"].shape[1] :].tolist()
            ended = thought[-2:] == [recipe.THINK_END, recipe.ACTION_START]
            kind = "ended" if ended else "capped"
            print(f"observation {index}: {kind}, {len(thought)} tokens, {len(set(thought))} different")
            if len(found[kind]) < 3 and (not ended or len(thought) > 10):
                found[kind].append(index)
                answers |= {f"thought_{index}": np.array(thought), f"prompt_{index}": inputs["input_ids"][0].numpy()}
                robot = self.unnormalize(torch.from_numpy(chosen)).numpy()
                answers |= {f"robot_{index}": robot} if ended else {}
                answers |= self.acted(f"acted_{index}", inputs, closed(thought))
            if all(len(indices) == 3 for indices in found.values()):
                break
        else:
            raise SystemExit(f"only {found} in {OBSERVATIONS} observations: change the weights in recipe.py")
        empty = [recipe.THINK_START, recipe.THINK_END, recipe.ACTION_START]
        answers |= self.acted("acted_without", self.observation(100), empty)
        return answers | {name: np.array(indices) for name, indices in found.items()}

    def observation(self, index: int) -> dict[str, Tensor]:
        """What the published evaluation passes to the model."""
        task = recipe.TASKS[index % len(recipe.TASKS)].lower().strip().replace("_", " ")
        text = self.processor.tokenizer.additional_special_tokens[0] * 2 + recipe.THINK_PREFIX + f"Task: {task};"
        pictures = recipe.pictures(index)
        inputs = self.processor(text=[text], images=self.pil(pictures), return_tensors="pt")
        pixels = exact_pixels(pictures, inputs["pixel_values"])
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "pixel_values": pixels}

    def acted(self, name: str, inputs: dict[str, Tensor], thought: list[int]) -> dict[str, Any]:
        """The action pass after a given thought: most likely bins and some of their logits."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([thought])], dim=1)
        logits, start = self.model.prompt_cot_predict_action(ids, inputs["pixel_values"], torch.ones_like(ids))
        rows = logits[0, start.item() : start.item() + recipe.CHUNK * recipe.ACTION_DIM]
        bins = rows[:, recipe.BAND[0] : recipe.BAND[-1] + 1].flip(-1)
        return {f"{name}_{key}": value for key, value in recipe.summary(bins, recipe.bin_columns()).items()}

    def table(self) -> dict[str, Any]:
        """The action tokenizer: ids of values, and values of all ids and some outside the band."""
        grid = torch.from_numpy(recipe.action_grid())
        ids = torch.arange(recipe.BAND[0] - 3, recipe.BAND[-1] + 4)
        values = self.tokenizer.decode_token_ids_to_actions(ids)
        return {"grid_ids": np.array([int(i) for i in self.tokenizer(grid)]), "band_values": values.numpy()}

    @staticmethod
    def pil(pictures: np.ndarray) -> list[Any]:
        """Pictures as the processor takes them."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in pictures]


def closed(thought: list[int]) -> list[int]:
    """A thought with the closing tags that it lacks."""
    tags = [recipe.THINK_END, recipe.ACTION_START]
    if thought[-2:] == tags:
        return thought
    return thought + (tags[1:] if thought[-1] == tags[0] else tags)


def exact_pixels(pictures: np.ndarray, processed: Tensor) -> Tensor:
    """The processor's pixels in float64; its own float32 values are compared first."""
    pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    assert (pixels - processed).abs().max() < 1e-6
    return pixels


if __name__ == "__main__":
    main()
