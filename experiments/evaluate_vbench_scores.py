"""`experiments.evaluate vbench-score` and `vbench-total`: scores of the dimensions, and what VBench makes of them.

Temporal flickering is computed here (nd_jax/evals/vbench.py) and equals VBench's; every other dimension is left to the
`vbench` package, one after another, in a Python of its own, because the versions that it pins are not ours. FILE is in
the format of VBench's own results and grows by a dimension at a time; the same command again goes on with the others.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.evaluate_vbench import add_dimension
from nd_jax.errors import UserError

# Where the package's Python finds it; empty where it does not.
FIND = "import importlib.util as u; spec = u.find_spec('vbench'); print(spec.origin if spec else '')"
# What that Python runs for a dimension. VBench tells devices apart by their class, so it gets no string.
RUN = """
import json, sys
import torch
from vbench import VBench
call = json.loads(sys.argv[1])
device = torch.device(call["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
VBench(device, call["info"], call["folder"]).evaluate(
    videos_path=call["videos"], name=call["dimension"], dimension_list=[call["dimension"]], local=call["local"]
)
"""
INSTALL = (
    "make an environment for it (python3 -m venv vbench-env; vbench-env/bin/pip install vbench, and detectron2 as its "
    "page says) and give --python vbench-env/bin/python"
)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--videos", required=True, type=Path, metavar="DIR", help="folder of vbench-generate")
    add("--output", required=True, type=Path, metavar="FILE", help="JSON file of scores, as VBench writes them")
    add_dimension(parser, "these alone (default all 16)")
    what = "VBench_full_info.json (default: that of the vbench package)"
    add("--prompts", type=Path, metavar="FILE", help=what)
    what = "that has the vbench package installed (default: the one that runs this)"
    add("--python", default=sys.executable, metavar="PROGRAM", help=what)
    add("--device", help="cuda or cpu, for VBench's networks (default: cuda if there is one)")
    add("--local", action="store_true", help="VBench's networks are in its cache folder already")
    add("--allow-missing", action="store_true", help="score what there is, where samples 0 to 4 are not complete")


def add_total_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "results of vbench-score or of VBench: JSON files, folders or ZIP files"
    add("--scores", nargs="+", action="extend", type=Path, metavar="FILE", help=what)
    add("--quality", type=float, metavar="Q", help="in the place of scores: quality, with --semantic")
    add("--semantic", type=float, metavar="S", help="in the place of scores: semantic, with --quality")
    add("--output", type=Path, metavar="FILE", help="JSON file of scores, normalised scores and totals")


def vbench_score(args: argparse.Namespace) -> dict[str, Any]:
    """Scores the dimensions that FILE lacks; returns what it then holds."""
    from nd_jax.evals.vbench import DIMENSIONS, FLICKERING, folder_flickering
    from nd_jax.evals.vbench_prompts import read_prompts
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    wanted = list(dict.fromkeys(args.dimension)) or list(DIMENSIONS)
    present = check_videos(args.videos)
    results = read_json(args.output) if args.output.exists() else {}
    newest = max((args.videos / name for name in present), key=lambda path: path.stat().st_mtime)
    if results and args.output.stat().st_mtime < newest.stat().st_mtime:
        raise UserError(f"{args.output}: is older than {newest.name}; delete it, or choose another --output")
    lacking = [name for name in wanted if name not in results]

    others, info = [name for name in lacking if name != FLICKERING], args.prompts
    if others or info is None:
        package = find_package(args.python)
        info = info or package.with_name("VBench_full_info.json")
    if others and info.suffix != ".json":
        raise UserError(
            f"{info}: VBench itself reads VBench_full_info.json alone; give that as --prompts for {others[0]}"
        )
    prompts = read_prompts([info], wanted)
    videos = {name: expected_videos(prompts, name) for name in wanted}
    check_complete(args, videos, present)
    try:  # Before the work, not behind it.
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror}); choose another --output") from error
    for name in lacking:
        if name == FLICKERING:
            found = folder_flickering(args.videos / video for video in videos[name] if video in present)
        else:
            found = run_vbench(args, info, name)
        results[name] = found
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {found[0]:.4f}", flush=True)
    return results


def expected_videos(prompts: Iterable[Any], dimension: str) -> list[str]:
    """Names of the videos that VBench scores for a dimension.

    Raises:
      UserError: no prompt has the dimension.
    """
    from nd_jax.evals.vbench_prompts import SAMPLES, video_name

    found = [video_name(p.prompt, k) for p in prompts if dimension in p.dimensions for k in range(SAMPLES)]
    if not found:
        raise UserError(f"{dimension}: no prompt is for it; give VBench_full_info.json as --prompts")
    return found


def check_videos(folder: Path) -> set[str]:
    """Names of the videos in a folder that holds nothing else: VBench takes the suffix of whatever file comes first."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give the folder of vbench-generate") from error
    foreign = sorted(name for name in names if not name.endswith(".mp4"))
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which is no .mp4 and would mislead VBench; move it away")
    if not names:
        raise UserError(f"{folder}: holds no videos; make them with vbench-generate")
    return names


def check_complete(args: argparse.Namespace, videos: dict[str, list[str]], present: set[str]) -> None:
    """Raises UserError when videos are missing that may not be, or all of a dimension's are."""
    for name, expected in videos.items():
        missing = [video for video in expected if video not in present]
        if missing and (len(missing) == len(expected) or not args.allow_missing):
            raise UserError(
                f"{args.videos}: lacks {len(missing)} of {len(expected)} videos of {name}, such as {missing[0]!r}; run "
                "vbench-generate to its end, or leave dimensions out by --dimension"
                + (", or give --allow-missing" if len(missing) < len(expected) else "")
            )


def find_package(python: str) -> Path:
    """The file __init__.py of the vbench package of some Python.

    Raises:
      UserError: no such program, or none that has VBench.
    """
    try:
        found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{python}: cannot be run ({error.strerror}); give a Python as --python") from error
    if found.returncode or not found.stdout.strip():
        raise UserError(
            f"{python} has no package vbench: {INSTALL}. Or give --dimension temporal_flickering and --prompts: that "
            "dimension needs no package"
        )
    return Path(found.stdout.strip())


def run_vbench(args: argparse.Namespace, info: Path, dimension: str) -> list[Any]:
    """[score, results of every video] of a dimension by the vbench package, whose output goes to ours.

    Raises:
      UserError: it failed, or left no result.
    """
    from nd_jax.evals.vbench import read_scores
    from nd_jax.weights.sources import read_json

    folder = args.output.with_name(args.output.name + ".vbench")
    result = folder / f"{dimension}_eval_results.json"
    result.unlink(missing_ok=True)
    call = {
        "device": args.device,
        "info": str(info),
        "folder": str(folder),
        "videos": str(args.videos),
        "dimension": dimension,
        "local": args.local,
    }
    print(f"{dimension}: VBench begins", flush=True)
    status = subprocess.run([args.python, "-c", RUN, json.dumps(call)], check=False).returncode
    if status or not result.exists():
        raise UserError(
            f"VBench failed at {dimension} (exit status {status}); correct what it says above and run the same "
            "command again, or leave the dimension out by --dimension"
        )
    read_scores([result])  # A score that is no number fails here, with the file.
    return read_json(result)[dimension]


def describe_score(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """The closing line."""
    from nd_jax.evals.vbench import DIMENSIONS, read_scores, totals

    scores = read_scores([args.output])
    lacking = [name for name in DIMENSIONS if name not in scores]
    said = f"without {', '.join(lacking)} there is no total" if lacking else percent(*totals(scores))
    return f"{len(results)} dimensions scored; {said}: {args.output}"


def vbench_total(args: argparse.Namespace) -> dict[str, Any]:
    """Quality, semantic and total, in the unit of what was given; with scores, these and the normalised ones too."""
    from nd_jax.evals.vbench import DIMENSIONS, normalized, read_scores, total_score, totals
    from nd_jax.files import write_text

    pair = (args.quality, args.semantic)
    if (args.scores is None) == (pair == (None, None)) or (args.scores is None and None in pair):
        raise UserError("give --scores, or --quality with --semantic")
    if args.scores is None:
        result = {"quality": pair[0], "semantic": pair[1], "total": total_score(*pair)}
    else:
        scores = read_scores(args.scores)
        result = {**totals(scores)._asdict(), "normalized": normalized(scores)}
        result["scores"] = {name: scores[name] for name in DIMENSIONS}
    if args.output:
        write_text(args.output, json.dumps(result, indent=1) + "\n")
    return result


def describe_total(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    said = percent(*(result[name] for name in ("quality", "semantic", "total")))
    if args.scores is None:  # Rounded numbers: a digit more shows what may be rounded either way.
        said = f"quality {result['quality']:g}, semantic {result['semantic']:g}, total {result['total']:.3f}"
    return f"{said}: {args.output}" if args.output else said


def percent(quality: float, semantic: float, total: float) -> str:
    return f"quality {100 * quality:.2f}, semantic {100 * semantic:.2f}, total {100 * total:.2f}"
