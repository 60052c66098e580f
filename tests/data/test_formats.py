"""LeRobot v2.1 and v3.0, videos and pictures in tables, thoughts as texts and as token ids: the same episodes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from policy.published_folder import gemma_tokenizer
from transformers import PreTrainedTokenizerFast

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.frame_reader import FrameReader
from dtvla.data.images import ImagePipeline
from dtvla.data.staging import StagedEpisode
from dtvla.errors import UserError
from dtvla.policy.vocabulary import train_tokenizer

from .conftest import make_pictures
from .format_v2 import write_v2

BOTH = ImagePipeline(("agentview", "wrist"), 32)


@pytest.fixture(scope="module")
def v2_root(tmp_path_factory: pytest.TempPathFactory, episodes: list[StagedEpisode]) -> Path:
    return write_v2(tmp_path_factory.mktemp("v2") / "text", episodes)


@pytest.fixture
def copy(v2_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v2_root, tmp_path / "copy"))


@pytest.fixture(params=["own", "gemma"])
def tokenizer(request: pytest.FixtureRequest, episodes: list[StagedEpisode]) -> PreTrainedTokenizerFast:
    if request.param == "gemma":
        core = gemma_tokenizer()
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    return train_tokenizer([thought for episode in episodes for thought in episode.thoughts], action_count=32)


def assert_same(one: Demonstrations, other: Demonstrations) -> None:
    for name in ("state_FD", "action_FD", "starts_E", "stops_E"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert [one.instruction(f) for f in range(len(one))] == [other.instruction(f) for f in range(len(other))]
    assert [one.thought(f) for f in range(len(one))] == [other.thought(f) for f in range(len(other))]
    assert one.texts() == other.texts()
    assert one.fps == other.fps


def pixels(demonstrations: Demonstrations, cache_dir: Path) -> torch.Tensor:
    cache = FrameCache(demonstrations, BOTH, cache_dir)
    cache.build()
    return cache[np.arange(len(demonstrations))]


def test_v21_reads_as_the_same_episodes_in_v30(v2_root: Path, dataset_root: Path, tmp_path: Path) -> None:
    old, new = Demonstrations(v2_root), Demonstrations(dataset_root)
    assert_same(old, new)
    assert torch.equal(pixels(old, tmp_path), pixels(new, tmp_path))
    assert old.fingerprint != new.fingerprint
    assert old.statistics == new.statistics


@pytest.mark.parametrize("in_tables", [False, True])
def test_what_lerobots_own_converter_makes_of_v21_reads_the_same(
    episodes: list[StagedEpisode], in_tables: bool, tmp_path: Path
) -> None:
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    tokenizer = train_tokenizer([t for e in episodes for t in e.thoughts], action_count=32)
    pictures = all_pictures(episodes) if in_tables else None
    root = write_v2(tmp_path / "set", with_gaps(episodes), tokenize=tokenize_with(tokenizer), pictures=pictures)
    original = Demonstrations(shutil.copytree(root, tmp_path / "original"), thought_tokenizer=tokenizer)
    convert_dataset("local/set", root=root, push_to_hub=False)
    assert json.loads((root / "meta/info.json").read_text())["codebase_version"] == "v3.0"
    converted = Demonstrations(root, thought_tokenizer=tokenizer)
    assert_same(converted, original)
    expected = pixels(original, tmp_path)
    assert torch.equal(pixels(converted, tmp_path), expected)
    assert torch.equal(FrameReader(converted, BOTH)[np.arange(len(original))], expected)


def test_published_statistics_are_used_as_they_are(copy: Path) -> None:
    values = Demonstrations(copy).statistics.to_dict()
    published = {k: {n: group[n] for n in ("mean", "std", "q01", "q99")} for k, group in values.items()}
    published["action"]["q99"][0] = 0.5
    (copy / "meta/norm_stats.json").write_text(json.dumps(published))
    demonstrations = Demonstrations(copy)
    assert demonstrations.statistics.to_dict() == published
    assert demonstrations.statistics_file == copy / "meta/norm_stats.json"


def test_v20_is_read_too_and_others_are_refused(copy: Path, v2_root: Path) -> None:
    path = copy / "meta/info.json"
    info = json.loads(path.read_text())
    (copy / "meta/episodes_stats.jsonl").unlink()
    path.write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    assert_same(Demonstrations(copy), Demonstrations(v2_root))
    for version in ("v1.6", "v4.0"):
        path.write_text(json.dumps(info | {"codebase_version": version}))
        with pytest.raises(UserError, match=rf"{version}.*v2\.0 to v3\.0"):
            Demonstrations(copy)


@pytest.mark.parametrize("damage", ["episodes", "tasks", "table", "row", "shorter", "task number", "template"])
def test_damaged_v21_metadata_and_tables_are_named(copy: Path, damage: str) -> None:
    table = copy / "data/chunk-001/episode_000002.parquet"
    expected = {"episodes": "episodes.jsonl", "tasks": "tasks.jsonl", "row": "length"}.get(damage, "episode_000002")
    if damage in ("episodes", "tasks"):
        (copy / f"meta/{damage}.jsonl").unlink()
    elif damage == "template":
        expected = "template is damaged.*chunk_index"
        text = (copy / "meta/info.json").read_text()
        (copy / "meta/info.json").write_text(text.replace("{episode_chunk:", "{chunk_index:"))
    elif damage == "row":
        (copy / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n')
    elif damage == "table":
        table.unlink()
    elif damage == "shorter":
        pq.write_table(pq.read_table(table)[:-1], table)
    else:
        expected = "task_index 1 has no text"
        lines = (copy / "meta/tasks.jsonl").read_text().splitlines()
        (copy / "meta/tasks.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match=expected):
        Demonstrations(copy)


def test_columns_missing_from_description_or_table_are_named(copy: Path) -> None:
    table = copy / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(table).drop_columns("observation.state"), table)
    with pytest.raises(UserError, match=r"episode_000001.*observation\.state"):
        Demonstrations(copy)
    path = copy / "meta/info.json"
    info = json.loads(path.read_text())
    del info["features"]["action"]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"columns \['action'\] are missing"):
        Demonstrations(copy)


def with_gaps(episodes: list[StagedEpisode]) -> list[StagedEpisode]:
    """The same episodes with some frames without a thought."""
    from dataclasses import replace

    return [
        replace(e, thoughts=[t if (i + k) % 5 else "" for k, t in enumerate(e.thoughts)])
        for i, e in enumerate(episodes)
    ]


def tokenize_with(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_token_ids_give_the_thoughts_that_they_spell(
    episodes: list[StagedEpisode], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    gappy = with_gaps(episodes)
    root = write_v2(tmp_path / "ids", gappy, tokenize=tokenize_with(tokenizer), length=64)
    demonstrations = Demonstrations(root, thought_tokenizer=tokenizer)
    thoughts = [thought or None for episode in gappy for thought in episode.thoughts]
    assert [demonstrations.thought(f) for f in range(len(demonstrations))] == thoughts
    assert None in thoughts
    rows = np.stack(pq.read_table(root / "data/chunk-000/episode_000000.parquet")["reasoning"].to_numpy())
    for frame, row in enumerate(rows):  # as the published training reads it
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        assert text.replace("<think> ", "<think>") == (f"<think>{thoughts[frame]}</think>" if thoughts[frame] else "")


def test_the_tokenizer_can_be_a_folder(episodes: list[StagedEpisode], tmp_path: Path) -> None:
    tokenizer = train_tokenizer([t for e in episodes for t in e.thoughts], action_count=32)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    root = write_v2(tmp_path / "ids", episodes, tokenize=tokenize_with(tokenizer))
    demonstrations = Demonstrations(root, thought_tokenizer=tmp_path / "checkpoint")
    assert demonstrations.thought(0) == episodes[0].thoughts[0]
    with pytest.raises(UserError, match=r"data\.thought_tokenizer.*absent"):
        Demonstrations(root, thought_tokenizer=tmp_path / "absent")
    with pytest.raises(UserError, match=r"token ids; set data\.thought_tokenizer"):
        Demonstrations(root)
    assert not Demonstrations(root, thoughts=False).has_thoughts


def test_rows_without_both_tags_are_no_thought_and_a_wrong_tokenizer_is_noticed(
    episodes: list[StagedEpisode], tmp_path: Path
) -> None:
    tokenizer = train_tokenizer([t for e in episodes for t in e.thoughts], action_count=32)
    ids = tokenize_with(tokenizer)

    def careless(text: str) -> list[int]:
        return ids(text.removesuffix("</think>") if "episode 1" in text else text)

    demonstrations = Demonstrations(
        write_v2(tmp_path / "some", episodes, tokenize=careless), thought_tokenizer=tokenizer
    )
    thoughts = [t if i != 1 else None for i, e in enumerate(episodes) for t in e.thoughts]
    assert [demonstrations.thought(f) for f in range(len(demonstrations))] == thoughts
    root = write_v2(tmp_path / "all", episodes, tokenize=lambda text: ids(text.replace("<think>", "")))
    with pytest.raises(UserError, match=r"reads no row as <think>"):
        Demonstrations(root, thought_tokenizer=tokenizer)
    small = train_tokenizer(["a"], action_count=4)
    with pytest.raises(UserError, match=r"data\.thought_tokenizer: the tokenizer has no id"):
        Demonstrations(root, thought_tokenizer=small)


def test_texts_with_tags_lose_them_and_none_at_all_is_refused(episodes: list[StagedEpisode], tmp_path: Path) -> None:
    from dataclasses import replace

    tagged = [replace(e, thoughts=[f"<think>{t}</think>" for t in e.thoughts]) for e in episodes]
    assert Demonstrations(write_v2(tmp_path / "tagged", tagged)).thought(3) == episodes[0].thoughts[3]
    empty = [replace(e, thoughts=[""] * len(e.thoughts)) for e in episodes]
    with pytest.raises(UserError, match=r"'reasoning' holds no thought.*cot=none"):
        Demonstrations(write_v2(tmp_path / "empty", empty))


def all_pictures(episodes: list[StagedEpisode]) -> dict[str, list[np.ndarray]]:
    return {
        camera: [make_pictures(i, c, len(e.state_F8)) for i, e in enumerate(episodes)]
        for c, camera in enumerate(BOTH.cameras)
    }


@pytest.mark.parametrize("rows_a_group", [1000, 7])
def test_pictures_in_tables_are_exact(episodes: list[StagedEpisode], rows_a_group: int, tmp_path: Path) -> None:
    pictures = all_pictures(episodes)
    root = write_v2(tmp_path / "tables", episodes, pictures=pictures)
    for path in root.rglob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=rows_a_group)
    demonstrations = Demonstrations(root)
    expected = BOTH({camera: np.concatenate(parts) for camera, parts in pictures.items()})
    assert torch.equal(pixels(demonstrations, tmp_path / "cache"), expected)
    reader = FrameReader(demonstrations, BOTH)
    reader.build()
    for frames in np.array_split(np.random.default_rng(0).permutation(len(demonstrations)), 9):
        assert torch.equal(reader[frames], expected[frames])


def test_a_table_without_pictures_inside_names_the_episode(episodes: list[StagedEpisode], tmp_path: Path) -> None:
    import pyarrow as pa

    root = write_v2(tmp_path / "tables", episodes, pictures=all_pictures(episodes))
    path = root / "data/chunk-001/episode_000003.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("observation.images.image")
    cells = [{"bytes": None, "path": "images/frame.png"}] * len(table)
    pq.write_table(table.set_column(place, table.field(place), pa.array(cells, table.field(place).type)), path)
    with pytest.raises(UserError, match=r"episode_000003.*episode 3: .*without a picture"):
        pixels(Demonstrations(root), tmp_path / "cache")
