"""Thoughts from a vision-language model on this machine, run by transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.cot.prompts import Prompt, fitted
from dtvla.errors import UserError
from dtvla.policy.hub import digest, find_checkpoint, reason

if TYPE_CHECKING:
    import torch

    from dtvla.cot.episodes import EpisodeView

ENDINGS = {".json", ".jinja", ".safetensors", ".model", ".txt"}  # of the files that decide what a model answers


class TransformersAnnotator(Annotator):
    """Writes thoughts with any model that transformers loads for pictures and text, in the model's own chat template.

    First attempts take the most likely words, others are drawn. An answer depends on its own frame, attempt and
    ``seed`` alone, up to the rounding of arithmetic in batches. It is all that the model wrote until it stopped, so
    marks of its own are seen by the checks.
    """

    def __init__(
        self,
        *,
        model: str,
        cameras: Sequence[str],
        prompt: str = "thought",
        template: Mapping[str, Any] | None = None,
        picture_size: int | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        seed: int = 0,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Load the weights. ``conf/annotator/transformers.yaml`` says what the settings mean.

        Raises:
            UserError: a setting is no good, or ``model`` is not there, is of another kind or is damaged.
        """
        from dtvla.policy.placement import place, type_name

        if (
            min(batch_size, max_new_tokens, 1 if picture_size is None else picture_size) < 1
            or temperature <= 0
            or seed < 0
        ):
            raise UserError(
                f"annotator: batch_size={batch_size}, max_new_tokens={max_new_tokens}, picture_size={picture_size}, "
                f"temperature={temperature}, seed={seed}; give a batch_size, max_new_tokens and picture_size of at "
                "least 1, a temperature above 0, and no negative seed"
            )
        if not cameras:
            raise UserError("annotator.cameras: there is none; name at least one camera of the dataset")
        self._prompt, self._cameras, self._picture_size = Prompt.load(prompt), tuple(cameras), picture_size
        self._template, self._temperature, self._seed = dict(template or {}), temperature, seed
        placed, type_ = place(device, dtype)
        folder = find_checkpoint(model, "annotator.model")
        self._model, self._processor = _load(folder, placed, type_)
        _check_template(folder, self._processor, self._template)
        generation = self._model.generation_config
        # The maker's settings for drawing words do not count: words are drawn by _Words, if at all.
        generation.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        generation.update(max_new_tokens=max_new_tokens, pad_token_id=self._processor.tokenizer.pad_token_id)
        self.jobs_per_call = batch_size
        self.identity = {
            "annotator": "transformers",
            "model": f"{model} ({digest(sorted(path for path in folder.iterdir() if path.suffix in ENDINGS))[:16]})",
            "prompt": self._prompt.digest,
            "template": self._template,
            "cameras": list(cameras),
            "picture_size": picture_size,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "dtype": type_name(type_),
        }

    def label(self, episode: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        """One answer for each job, in order; ``facts`` hold tokens and whether ``max_new_tokens`` cut it off.

        Raises:
            UserError: the episode lacks a camera, its pictures can't be decoded, the model can't take what it is
                asked, or there is too little memory.
        """
        import torch

        inputs = self._inputs(episode, jobs)
        words = _Words([[self._seed, episode.number, job.frame, job.attempt] for job in jobs], self._temperature)
        try:
            with torch.inference_mode():
                ids_BL = self._model.generate(**inputs, logits_processor=[words])
        except torch.OutOfMemoryError:
            raise UserError(
                f"annotator.batch_size: {len(jobs)} frames at a time do not fit into the memory of "
                f"{self._model.device}; use fewer, or smaller pictures (annotator.picture_size)"
            ) from None
        asked_BL, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
        return [
            self._answer(row[length:], int(mask.sum())) for row, mask in zip(ids_BL.tolist(), asked_BL, strict=True)
        ]

    def close(self) -> None:
        """Give back the model's memory."""
        import torch

        del self._model
        torch.cuda.empty_cache()

    def _inputs(self, episode: EpisodeView, jobs: Sequence[Job]) -> Any:
        """What the model reads, padded on the left: ``input_ids`` and ``attention_mask`` (B, L), pictures and more."""
        frames = sorted({job.frame for job in jobs})
        pictures: dict[int, list[Any]] = {frame: [] for frame in frames}
        for camera in self._cameras:
            for frame, picture in zip(frames, episode.pictures(camera, frames), strict=True):
                pictures[frame].append(fitted(picture, self._picture_size))
        try:
            inputs = self._processor.apply_chat_template(
                [self._conversation(episode, job, pictures[job.frame]) for job in jobs],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
                **self._template,
            )
        except Exception as error:  # of the template, the tokenizer, the picture processor: of many kinds
            raise UserError(
                f"annotator.model: its chat template or processor refuses what it is asked ({reason(error)}); for a "
                "template that knows no system's message set annotator.prompt to a file without '# system'"
            ) from None
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _conversation(self, episode: EpisodeView, job: Job, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        system, text = self._prompt.messages(episode, job, self._cameras)
        seen = [{"type": "image", "image": picture} for picture in pictures]
        user = {"role": "user", "content": [{"type": "text", "text": text}, *seen]}
        return [user] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}, user]

    def _answer(self, ids: list[int], tokens_in: int) -> Answer:
        """The text before the first token that ends an answer; behind it, ``ids`` are padding."""
        ends = self._model.generation_config.eos_token_id
        ends = {*ends} if isinstance(ends, list) else {ends}
        stop = next((place for place, token in enumerate(ids) if token in ends), None)
        own = ids[:stop]
        text = self._processor.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Answer(text, {"tokens_in": tokens_in, "tokens_out": len(own), "truncated": stop is None})


class _Words:
    """Chooses the words of further attempts, each row with random numbers of its own, and leaves others as they are.

    It serves as a logits processor of greedy generation, because ``generate`` itself draws all rows from one stream.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], temperature: float) -> None:
        """Begin B streams; each seed ends with the attempt, and the first one is greedy."""
        self._temperature = temperature
        self._streams = [np.random.default_rng(seed) if seed[-1] else None for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in which a drawn row admits nothing but its word."""
        import torch

        for row, stream in enumerate(self._streams):
            if stream is not None:
                sums_V = torch.softmax(scores[row].double() / self._temperature, -1).cumsum(-1)
                word = torch.searchsorted(sums_V, sums_V[-1] * stream.random(), right=True)
                scores[row] = torch.full_like(scores[row], -torch.inf).index_fill_(0, word, 0.0)
        return scores


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor; no code of the folder is run and nothing is unpickled."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KINDS
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"annotator.model: {folder} has no weights in safetensors, and pickled ones are not read, as they could "
            "run any code; copy it whole, or convert it: model.save_pretrained(folder)"
        )
    loader: Any = AutoModelForImageTextToText
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = type(config) in KINDS
        if known:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            words = processor.tokenizer  # a kind without a processor for pictures has none
            words.pad_token = words.pad_token or words.eos_token
            model, report = loader.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"annotator.model: {folder} in {dtype} does not fit into the memory of {device}; use a smaller model or "
            "annotator.dtype=bfloat16"
        ) from None
    except Exception as error:  # of files of any kind, and of packages that a model wants
        raise UserError(
            f"annotator.model: {folder} can't be loaded ({reason(error)}); copy it whole, install the package that it "
            "asks for, or choose a model that transformers knows itself: code in the folder is not run"
        ) from None
    if not known:
        raise UserError(
            f"annotator.model: {folder} is a {config.model_type}, which transformers does not know to take pictures "
            "and write text; give a vision-language model such as Qwen/Qwen3-VL-4B-Instruct"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"annotator.model: {folder} lacks {len(missing)} weights, such as {missing[0]}; copy it again")
    return model, processor


def _check_template(folder: Path, processor: Any, template: Mapping[str, Any]) -> None:
    if processor.chat_template is None:
        raise UserError(
            f"annotator.model: {folder} has no chat template, so it was not made to be asked; give a model that was "
            "(often called instruct or it)"
        )
    if unknown := [name for name in template if not re.search(rf"\b{re.escape(name)}\b", str(processor.chat_template))]:
        raise UserError(
            f"annotator.template: the chat template of {folder} knows no {', '.join(unknown)}; correct or leave it out"
        )
