"""Entry point: a local page to accept, edit or reject thoughts with the keyboard.

    python -m dtvla.review dataset=outputs/data/NAME

Settings are in ``conf/review.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from getpass import getuser
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import entry
from dtvla.errors import UserError
from dtvla.kinds import check_kinds

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.cot.review.decisions import DecisionLog
    from dtvla.cot.review.material import Material
    from dtvla.cot.review.session import Check, Review

SHOWS = ("unreviewed", "all")
KINDS: dict[str, Any] = {
    **dict.fromkeys(("dataset", "bundle", "decisions", "reviewer", "thought_tokenizer", "export"), str | None),
    **{"show": str, "changes": bool, "episodes": list[int] | None, "strip": list[int], "schema": dict[str, Any]},
    **{"import": str | list[str] | None, "host": str, "port": int},
}
CONFLICTS_SAID = 20


@entry("review")
def main(cfg: DictConfig) -> None:
    """Review as configured."""
    run(cfg)


def run(cfg: DictConfig) -> None:
    """Serve the page until it is interrupted; or export, or import.

    Raises:
        UserError: a setting or a file is wrong, or the port is taken.
    """
    from dtvla.cot.review.decisions import DecisionLog
    from dtvla.cot.review.session import Review
    from dtvla.learning.composing import plain

    source = _source(cfg)
    material, strip = _material(cfg, source)
    path = source.with_name(f"{source.name}.decisions.jsonl")
    if cfg.decisions is not None:
        path = Path(str(cfg.decisions)).expanduser()
    reviewer = cfg.reviewer or getuser()
    check = check_of({**material.schema, **plain(cfg.schema)})
    with DecisionLog(path) as log:
        review = Review(material, log, check, reviewer=reviewer, strip=strip, show=str(cfg.show))
        if cfg["import"] is not None:
            _import(cfg["import"], log, material)
        elif cfg.export is not None:
            _export(Path(str(cfg.export)).expanduser(), review, strip)
        else:
            _serve(review, cfg.host, cfg.port)
        done = review.progress()
        reviewed = done["accept"] + done["edit"] + done["reject"]
        print(
            f"{path}: {reviewed} of {done['frames']} frames reviewed, {done['edit']} edited, {done['reject']} rejected"
        )


def check_of(settings: Mapping[str, Any]) -> Check:
    """The checks that an accepted or edited thought must pass, as in `dtvla annotate`: a schema with these settings.

    Raises:
        UserError: a setting is wrong.
    """
    from dtvla.cot.schema import Schema, SchemaSettings

    check_kinds("schema", SchemaSettings, settings)
    schema = Schema(SchemaSettings(**settings))
    return lambda text, objects: [violation.message for violation in schema.violations(text, objects)]


def _source(cfg: DictConfig) -> Path:
    """The dataset's folder or the bundle, without a slash at its end."""
    from dtvla.data.hub import locate
    from dtvla.learning.composing import plain

    check_kinds("", KINDS, {name: plain(cfg[name]) for name in KINDS})
    given = [name for name in ("dataset", "bundle") if cfg[name] is not None]
    if len(given) != 1:
        found = "both dataset and bundle" if given else "neither"
        raise UserError(f"dataset: found {found}; give dataset=FOLDER, or bundle=FILE.zip of an export")
    if cfg.show not in SHOWS:
        raise UserError(f"show: {cfg.show!r} is unknown; use {' or '.join(SHOWS)}")
    if cfg.export is not None and cfg["import"] is not None:
        raise UserError("export: found import, too; import first, then export")
    path = Path(str(cfg[given[0]])).expanduser()
    return (locate(path, Path(cfg.paths.data), "dataset") if cfg.dataset is not None else path).absolute()


def _material(cfg: DictConfig, source: Path) -> tuple[Material, list[int]]:
    """What is reviewed, and the offsets of the neighbours that are shown."""
    if cfg.bundle is not None:
        from dtvla.cot.review.bundle import BundleMaterial

        bundle = BundleMaterial(source)
        return bundle, bundle.strip
    from dtvla.cot.review.material import DatasetMaterial

    episodes = None if cfg.episodes is None else list(cfg.episodes)
    dataset = DatasetMaterial(source, changes=cfg.changes, episodes=episodes, thought_tokenizer=cfg.thought_tokenizer)
    return dataset, list(cfg.strip)


def _serve(review: Review, host: str, port: int) -> None:
    import secrets
    import socket

    from dtvla.cot.review.server import create_app, make_review_server

    local = host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)
    key = None if local else secrets.token_urlsafe(16)
    server = make_review_server(create_app(review, key), host, port)
    name = socket.gethostname() if host == "0.0.0.0" else host
    print(f"review at http://{name}:{server.port}/{'' if key is None else f'?key={key}'}", flush=True)
    print("end with ctrl-c; every decision is on disk at once", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _export(path: Path, review: Review, strip: list[int]) -> None:
    from rich.progress import Progress

    from dtvla.cot.review.bundle import write_bundle

    frames = review.chosen()
    with Progress(transient=True) as progress:
        bar = progress.add_task("pictures", total=None)
        write_bundle(
            path,
            review.material,
            frames,
            strip,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.1f} MB")
    print(
        f"elsewhere: dtvla review bundle={path.name}; "
        f"then here: dtvla review dataset=... import={path.name}.decisions.jsonl"
    )


def _import(setting: Any, log: DecisionLog, material: Material) -> None:
    from dtvla.cot.review.merging import merge

    thoughts = {frame.key: frame.thought for frame in material.frames}
    for name in [setting] if isinstance(setting, str) else setting:
        path = Path(str(name)).expanduser()
        merged = merge(log, path, thoughts)
        for sentence in merged.conflicts[:CONFLICTS_SAID]:
            print(f"conflict: {sentence}")
        if (more := len(merged.conflicts) - CONFLICTS_SAID) > 0:
            print(f"conflict: {more} more")
        print(
            f"{path}: {merged.taken} decisions taken, {merged.known} known already, {merged.foreign} of other thoughts"
        )


if __name__ == "__main__":
    main()
