"""Protects the annotator for local models: what real tiny models read and write, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from training_data import write_demonstrations
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from dtvla.annotate import annotate
from dtvla.cli import config_dir
from dtvla.cot.annotator import Answer, Job
from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
from dtvla.cot.transformers_annotator import TransformersAnnotator, _Words
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode
from dtvla.errors import UserError
from dtvla.learning.composing import made

FRAMES, CAMERAS, TOKENS = 24, ("agentview", "wrist"), 12
QWEN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
GEMMA = ("<pad>", "<eos>", "<bos>", "<turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<soft>")
TEMPLATE = (
    "{% for m in messages %}[START]{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}[IMAGE]"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}[END]\n{% endfor %}{% if add_generation_prompt %}[START]model\n"
    "{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 8}
SPREAD = 0.3  # of the random weights: wide enough for answers that differ between frames


def tokenizer(special: Sequence[str], **roles: Any) -> PreTrainedTokenizerFast:
    """Pieces of dtvla's own prompt."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=[*special], show_progress=False
    )
    backend.train_from_iterator([(config_dir() / "annotator/prompts/thought.md").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def template(start: str, image: str, end: str) -> str:
    return TEMPLATE.replace("[START]", start).replace("[IMAGE]", image).replace("[END]", end)


def save_qwen3(folder: Path) -> None:
    roles = dict(zip(("vision_bos_token", "vision_eos_token", "image_token", "video_token"), QWEN[3:], strict=True))
    words = tokenizer(QWEN, eos_token=QWEN[2], pad_token=QWEN[0], extra_special_tokens=roles)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "initializer_range": SPREAD,
        },
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": SPREAD,
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[2, 0])
    pictures = Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 16**2, "longest_edge": 64**2})
    chat = template(QWEN[1], "".join((QWEN[3], QWEN[5], QWEN[4])), QWEN[2])
    processor = Qwen3VLProcessor(pictures, words, Qwen3VLVideoProcessor(patch_size=8), chat_template=chat)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_gemma3(folder: Path) -> None:
    roles = dict(zip(("boi_token", "eoi_token", "image_token"), GEMMA[5:], strict=True))
    words = tokenizer(GEMMA, eos_token=GEMMA[1], pad_token=GEMMA[0], bos_token=GEMMA[2], extra_special_tokens=roles)
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "num_key_value_heads": 1,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "initializer_range": SPREAD,
        },
        vision_config={**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32},
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[1, 4])
    chat = "{{ bos_token }}" + template(GEMMA[3], GEMMA[5], GEMMA[4])
    pictures = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    Gemma3Processor(pictures, words, chat_template=chat, image_seq_length=4).save_pretrained(folder)


SAVE: dict[str, Callable[[Path], None]] = {"qwen3": save_qwen3, "gemma3": save_gemma3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind, save in SAVE.items():
        save(root / kind)
    return {kind: root / kind for kind in SAVE}


@pytest.fixture(params=SAVE)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> AnnotatedFrames:
    return AnnotatedFrames(write_demonstrations(tmp_path_factory.mktemp("squares") / "data", 2, FRAMES))


def open_model(folder: Path, **settings: Any) -> TransformersAnnotator:
    defaults: dict[str, Any] = {"cameras": CAMERAS, "max_new_tokens": TOKENS, "temperature": 1.0, "device": "cpu"}
    return TransformersAnnotator(model=str(folder), **(defaults | settings))


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def read_text(annotator: TransformersAnnotator, episode: EpisodeView, job: Job) -> str:
    """What a model is told, special tokens included."""
    [ids] = annotator._inputs(episode, [job])["input_ids"]
    return str(annotator._processor.tokenizer.decode(ids))


def test_first_answers_are_the_likeliest_words_in_any_batch(dataset: AnnotatedFrames, folder: Path) -> None:
    """Beside the same words chosen one by one, without a cache or padding."""
    annotator, episode = open_model(folder), dataset[1]
    jobs = [Job(frame) for frame in np.random.default_rng(0).permutation(FRAMES)[:4].tolist()]
    longer = Job(3, 0, ("has 4 words, expected 8 to 80",))
    found = annotator.label(episode, [*jobs, longer])[: len(jobs)]
    ends = annotator._model.generation_config.eos_token_id
    for job, answer in zip(jobs, found, strict=True):
        inputs = dict(annotator._inputs(episode, [job]))
        own: list[int] = []
        while len(own) < TOKENS:
            with torch.inference_mode():
                own.append(int(annotator._model(**inputs, use_cache=False).logits[0, -1].argmax()))
            for name, extra in (
                ("input_ids", own[-1]),
                ("attention_mask", 1),
                ("mm_token_type_ids", 0),
                ("token_type_ids", 0),
            ):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[extra]])], 1)
            if own[-1] in ends:
                break
        words = [word for word in own if word not in ends]
        assert answer.text == annotator._processor.tokenizer.decode(words)
        assert (answer.facts["tokens_out"], answer.facts["truncated"]) == (len(words), len(words) == TOKENS)
        assert answer.facts["tokens_in"] == inputs["input_ids"].shape[1] - len(own)
    assert len({*texts(found)}) > 1, "the answers do not depend on the frames: this test sees nothing"


def test_further_attempts_differ_but_each_is_always_the_same(dataset: AnnotatedFrames, folder: Path) -> None:
    jobs = [Job(frame, attempt) for frame in (3, 20) for attempt in (0, 1, 2)]
    by_job = dict(zip(jobs, texts(open_model(folder).label(dataset[0], jobs)), strict=True))
    drawn = [job for job in jobs if job.attempt]
    assert len({by_job[job] for job in drawn} - {by_job[Job(3)], by_job[Job(20)]}) == len(drawn)
    again = open_model(folder)
    for part in np.array_split(np.random.default_rng(1).permutation(len(jobs)), 4):
        chosen = [jobs[place] for place in part]
        assert texts(again.label(dataset[0], chosen)) == [by_job[job] for job in chosen]
    other = texts(open_model(folder, seed=1).label(dataset[0], jobs))
    assert [text == by_job[job] for job, text in zip(jobs, other, strict=True)] == [job.attempt == 0 for job in jobs]
    hot = open_model(folder, temperature=1e6)  # the pictures have no say: random numbers alone make the difference
    noise = [text for episode in (dataset[0], dataset[1]) for text in texts(hot.label(episode, drawn))]
    assert len({*noise}) == len(noise)


def test_words_are_drawn_with_their_probabilities() -> None:
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -1.0])
    expected = torch.softmax(scores / 0.5, 0).numpy()
    words = _Words([[7, row, row % 4] for row in range(2000)], 0.5)
    chosen = words(torch.zeros(2000, 1), scores.repeat(2000, 1))
    greedy, drawn = chosen[::4], chosen[np.arange(2000) % 4 > 0]
    assert bool((greedy == scores).all())
    assert bool(((drawn == 0).sum(1) == 1).all())
    assert bool(((drawn == -torch.inf).sum(1) == 4).all())
    shares = (drawn == 0).float().mean(0).numpy()
    np.testing.assert_allclose(shares, expected, atol=0.04)
    assert shares[1] == 0
    words = _Words([[7, 0, 1]], 0.5)
    words._streams = [SimpleNamespace(random=lambda: 0.0)]  # type: ignore[list-item]
    assert words(torch.zeros(1, 1), torch.tensor([[-torch.inf, 1.0, 1.0]])).tolist() == [[-np.inf, 0.0, -np.inf]]


def test_the_model_reads_the_pictures_of_its_frame_in_the_order_of_the_cameras(
    dataset: AnnotatedFrames, folder: Path
) -> None:
    annotator, episode, frames = open_model(folder), dataset[1], (20, 3)
    pictures = [Image.fromarray(episode.picture(camera, frame)) for frame in frames for camera in CAMERAS]
    expected = annotator._processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    found = annotator._inputs(episode, [Job(frame) for frame in frames])["pixel_values"]
    assert torch.equal(found, expected)
    small = open_model(folder, picture_size=24, cameras=CAMERAS[1:])
    expected = annotator._processor.image_processor([pictures[1].resize((24, 24), Image.Resampling.BICUBIC)])
    assert np.array_equal(small._inputs(episode, [Job(20)])["pixel_values"], expected["pixel_values"])
    turned = open_model(folder, cameras=CAMERAS[::-1])
    expected = annotator._processor.image_processor(pictures[1::-1], return_tensors="pt")["pixel_values"]
    assert torch.equal(turned._inputs(episode, [Job(20)])["pixel_values"], expected)
    assert texts(turned.label(episode, [Job(3)])) != texts(annotator.label(episode, [Job(3)]))


def test_the_model_reads_the_prompt_in_its_own_chat_template(
    dataset: AnnotatedFrames, folders: dict[str, Path], tmp_path: Path
) -> None:
    episode, job = dataset[0], Job(5, 1, ("has 4 words, expected 8 to 80",))
    annotator = open_model(folders["qwen3"])
    system, text = annotator._prompt.messages(episode, job, CAMERAS)
    assert episode.instruction in text
    assert job.complaints[0] in text
    seen = 2 * f"{QWEN[3]}{16 * QWEN[5]}{QWEN[4]}"
    expected = f"{QWEN[1]}system\n{system}{QWEN[2]}\n{QWEN[1]}user\n{text}{seen}{QWEN[2]}\n{QWEN[1]}model\n"
    assert read_text(annotator, episode, job) == expected
    assert read_text(open_model(folders["gemma3"]), episode, job).count("<bos>") == 1
    silent = open_model(folders["qwen3"], template={"enable_thinking": False})
    assert read_text(silent, episode, job) == expected + "no thinking"
    assert texts(silent.label(episode, [job])) != texts(annotator.label(episode, [job]))
    prompt = tmp_path / "short.md"
    prompt.write_text("# frame\nhow to $instruction?\n# again\n$complaints\n")
    short = read_text(open_model(folders["qwen3"], prompt=str(prompt)), episode, Job(5))
    assert short == f"{QWEN[1]}user\nhow to {episode.instruction}?{seen}{QWEN[2]}\n{QWEN[1]}model\n"


def test_an_answer_is_all_that_the_model_wrote_before_it_stopped(
    dataset: AnnotatedFrames, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    annotator = open_model(folders["qwen3"])
    encode = annotator._processor.tokenizer.encode
    written = [encode("<think>move up .</think>") + [2], [1, 5, 0], encode("<think>cut")]
    longest = max(map(len, written))

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [row + (longest - len(row)) * [0] for row in written[:2]] + [(written[2] * longest)[:longest]]
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(annotator._model, "generate", generate)
    whole, marks, cut = annotator.label(dataset[0], [Job(0), Job(11), Job(12)])
    assert whole.text == "<think>move up .</think>"
    assert marks.text == QWEN[1] + QWEN[5]
    assert cut.text.startswith("<think>cut<think>")
    assert [answer.facts["truncated"] for answer in (whole, marks, cut)] == [False, False, True]


def test_the_makers_settings_for_drawing_words_do_not_count(
    dataset: AnnotatedFrames, folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 9.0, "top_p": 0.5, "top_k": 2, "num_beams": 3}
    (other / "generation_config.json").write_text(json.dumps(settings | sampling))
    jobs = [Job(3), Job(3, 1), Job(4, 2)]
    assert texts(open_model(other).label(dataset[0], jobs)) == texts(open_model(folder).label(dataset[0], jobs))


def test_a_tokenizer_without_padding_will_do(
    dataset: AnnotatedFrames, folders: dict[str, Path], tmp_path: Path
) -> None:
    other, jobs = shutil.copytree(folders["qwen3"], tmp_path / "other"), [Job(3), Job(4, 0, ("has 4 words",))]
    edit(other / "tokenizer_config.json", pad_token=None)
    annotator = open_model(other)
    assert annotator._processor.tokenizer.pad_token == QWEN[2]
    assert texts(annotator.label(dataset[0], jobs)) == texts(open_model(folders["qwen3"]).label(dataset[0], jobs))


def test_identity_tells_apart_what_writes_other_thoughts(folders: dict[str, Path], tmp_path: Path) -> None:
    prompt, worded = tmp_path / "short.md", shutil.copytree(folders["qwen3"], tmp_path / "worded")
    prompt.write_text("# frame\n$instruction\n# again\n$complaints\n")
    (worded / "chat_template.jinja").write_text(TEMPLATE)
    settings: list[dict[str, Any]] = [
        {},
        {"folder": folders["gemma3"]},
        {"folder": worded},
        {"prompt": str(prompt)},
        {"cameras": ["agentview"]},
        {"picture_size": 20},
        {"max_new_tokens": 7},
        {"temperature": 0.5},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"template": {"enable_thinking": False}},
    ]
    found = [open_model(**{"folder": folders["qwen3"], **changes}).identity for changes in settings]
    assert len({json.dumps(identity, sort_keys=True) for identity in found}) == len(settings)
    moved = open_model(shutil.copytree(folders["qwen3"], tmp_path / "moved")).identity
    digests = [identity["model"].split()[-1] for identity in (moved, *found[:3])]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    assert open_model(folders["qwen3"], batch_size=3).identity == found[0]
    assert open_model(folders["qwen3"], batch_size=3).jobs_per_call == 3
    recipe = OmegaConf.load(config_dir() / "annotator/transformers.yaml")
    changes = {"model": str(folders["qwen3"]), "max_new_tokens": TOKENS, "temperature": 1.0, "device": "cpu"}
    assert made(OmegaConf.merge(recipe, changes)).identity == found[0]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def text_only(folder: Path) -> None:
    sizes: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"}
    LlamaForCausalLM(LlamaConfig(vocab_size=600, **sizes)).save_pretrained(folder)


def not_a_model(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def code_of_its_own(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('the code of the folder ran')\n")
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda folder: shutil.rmtree(folder), r"annotator\.model: no folder .*model"),
    "pickled": (only_pickled, r"annotator\.model: .*no weights in safetensors.*pickled.*save_pretrained"),
    "no pictures": (text_only, r"annotator\.model: .*is a llama, .*give a vision-language model"),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template.*instruct"),
    "no picture processor": (
        lambda folder: (folder / "processor_config.json").unlink(),
        "image processor.*copy it whole",
    ),
    "broken configuration": (not_a_model, r"annotator\.model: .*can't be loaded"),
    "code of its own": (code_of_its_own, r"annotator\.model: .*code in the folder is not run"),
    "a weight lacks": (
        lambda folder: rewrite_weights(folder, lambda all_: all_.pop("model.language_model.norm.weight")),
        "lacks 1 weights, such as model.language_model.norm.weight; copy it again",
    ),
    "a weight of another shape": (
        lambda folder: rewrite_weights(
            folder, lambda all_: all_.update({"model.language_model.norm.weight": torch.ones(5)})
        ),
        r"annotator\.model: .*can't be loaded",
    ),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-99]),
        r"annotator\.model: .*can't be loaded",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_will_not_do_is_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    spoil, message = FAULTS[fault]
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to transformers' question whether to run a folder's code
    folder = shutil.copytree(folders["qwen3"], tmp_path / "a/b/model")
    open_model(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as refused:
        open_model(folder)
    assert str(folder) in str(refused.value)


def test_settings_that_will_not_do_are_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"batch_size": 0, "max_new_tokens": 0, "picture_size": 0, "temperature": 0.0, "seed": -1}
    for name, value in numbers.items():
        with pytest.raises(UserError, match=rf"annotator: .*{name}={value}"):
            open_model(folders["qwen3"], **{name: value})
    with pytest.raises(UserError, match=r"annotator\.cameras: there is none"):
        open_model(folders["qwen3"], cameras=[])
    with pytest.raises(UserError, match=r"annotator\.template: .*knows no enable_thinkin[;,]"):
        open_model(folders["qwen3"], template={"enable_thinkin": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: cuda was asked for but .* finds no GPU"):
        open_model(folders["qwen3"], device="cuda")


def test_what_goes_wrong_with_a_frame_is_named(
    dataset: AnnotatedFrames, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no pictures 'ceiling'"):
        open_model(folders["qwen3"], cameras=["ceiling"]).label(dataset[0], [Job(0)])
    strict = shutil.copytree(folders["qwen3"], tmp_path / "strict")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + (strict / "chat_template.jinja").read_text())
    with pytest.raises(UserError, match=r"refuses .*no system role.*annotator\.prompt .*'# system'"):
        open_model(strict).label(dataset[0], [Job(0)])

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    annotator = open_model(folders["qwen3"])
    monkeypatch.setattr(annotator._model, "generate", full)
    with pytest.raises(UserError, match=r"annotator\.batch_size: 2 frames at a time do not fit.*cpu.*use fewer"):
        annotator.label(dataset[0], [Job(0), Job(1)])
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(UserError, match=r"annotator\.model: .*float32 does not fit.*cpu.*annotator\.dtype"):
        open_model(folders["qwen3"])


THOUGHTS = (
    "the alphabet soup is at the far left and the gripper is open. next, move above the alphabet soup.",
    "the gripper is closed and holds the alphabet soup. next, carry the alphabet soup over to the basket.",
)


def write_coloured(root: Path, frames: int = 8) -> Path:
    """Two episodes in which nothing but the colour of the picture tells the phase; the gripper closes half way."""
    rng, staged = np.random.default_rng(0), []
    colours, phase_F = np.array([[200, 60, 40], [40, 60, 200]]), 2 * np.arange(frames) // frames
    for number in range(2):
        noise = rng.integers(-30, 30, (len(CAMERA_KEYS), frames, 32, 32, 3))
        pictures = {
            camera: (colours[phase_F][:, None, None] + noise[place]).astype(np.uint8)
            for place, camera in enumerate(CAMERA_KEYS)
        }
        action_F7 = rng.uniform(-1, 1, (frames, 7))
        action_F7[:, 6] = np.where(phase_F, 1, -1)
        instruction = "pick up the alphabet soup and place it in the basket"
        source = EpisodeSource(number, "libero_object", 0, instruction, number, number, frames, 0)
        staged.append(StagedEpisode.encode(source, rng.normal(size=(frames, 8)), action_F7, frames * [""], pictures))
    write_dataset(root, staged, {"made": "for a test"})
    return root


def teach(annotator: TransformersAnnotator, episode: EpisodeView, frames: Sequence[int], steps: int) -> None:
    """Train until these frames of an episode have the two thoughts as answers."""
    model, words = annotator._model, annotator._processor.tokenizer
    inputs = dict(annotator._inputs(episode, [Job(frame) for frame in frames]))
    rows = [words.encode(f"<think>{thought}</think>") for thought in THOUGHTS]
    longest = max(map(len, rows)) + 1
    ends = model.generation_config.eos_token_id
    target_BT = torch.tensor([row + (longest - len(row)) * ends[:1] for row in rows])
    for name, extra_BT in (("input_ids", target_BT), ("attention_mask", torch.ones_like(target_BT))):
        inputs[name] = torch.cat([inputs[name], extra_BT], 1)
    for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[name] = torch.cat([inputs[name], torch.zeros_like(target_BT)], 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        logits_BTV = model(**inputs).logits[:, -longest - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_model_that_learned_two_pictures_annotates_a_dataset(folder: Path, tmp_path: Path) -> None:
    root, prompt = write_coloured(tmp_path / "coloured"), tmp_path / "short.md"
    prompt.write_text("# frame\n$instruction\n# again\n$complaints\n")
    learner = open_model(folder, cameras=["agentview"], prompt=str(prompt))
    teach(learner, AnnotatedFrames(root)[0], (1, 6), steps=60)
    for part in (learner._model, learner._processor):
        part.save_pretrained(tmp_path / "taught")
    learner.close()
    overrides = [
        *(f"dataset={root}", f"output={tmp_path / 'thoughts'}", "pictures=0", "annotator=transformers"),
        *(f"annotator.model={tmp_path / 'taught'}", f"annotator.prompt={prompt}", "annotator.cameras=[agentview]"),
        *("annotator.max_new_tokens=120", "annotator.batch_size=3", "annotator.device=cpu"),
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        record = annotate(compose("annotate", overrides=overrides))
    data = Demonstrations(tmp_path / "thoughts")
    assert [data.thought(frame) for frame in range(len(data))] == 2 * [*4 * THOUGHTS[:1], *4 * THOUGHTS[1:]]
    assert record["origins"]["annotated"] == record["totals"]["answers"] == len(data)
