"""Prompt sources: formats, order, malformed records, the writer and the split."""

import codecs
import hashlib
import json
import os
import re
import threading

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data import prompts
from nd_jax.data.prompts import PromptSource
from nd_jax.errors import UserError

CATS = ["a cat", "zwei Kätzchen", "三只猫"]
# Anything a user may type on one line; surrogates are no text.
LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and text.encode().strip() and not text.startswith("\ufeff")
)


def write(path, data: bytes | str):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(texts, key="prompt"):
    return "".join(json.dumps({key: text, "dimensions": ["color"]}) + "\n" for text in texts)


def array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def error_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        PromptSource(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_format_gives_the_same_prompts_and_fingerprint(tmp_path):
    sources = [
        PromptSource(write(tmp_path / "a.txt", "\n".join(CATS))),
        PromptSource(write(tmp_path / "b.txt", codecs.BOM_UTF8 + "\r\n".join([*CATS, "", ""]).encode())),
        PromptSource(write(tmp_path / "c.jsonl", jsonl(CATS) + "\n \n")),
        PromptSource(write(tmp_path / "d.jsonl", jsonl(CATS, "caption")), key="caption"),
        PromptSource(array_record(tmp_path / "e.array_record", [text.encode() for text in CATS])),
        PromptSource(array_record(tmp_path / "f.array_record", [json.dumps({"prompt": t}).encode() for t in CATS])),
    ]
    for source in sources:
        assert list(source) == CATS
        assert source.num_skipped == 0
    assert len({source.fingerprint for source in sources}) == 1
    other = PromptSource(write(tmp_path / "g.txt", "\n".join(reversed(CATS))))
    assert other.fingerprint != sources[0].fingerprint


@given(st.lists(LINE, min_size=1, max_size=8), st.integers(0, 3), st.sampled_from(["\n", "\r\n"]))
def test_text_lines_come_back(tmp_path_factory, lines, blanks, end):
    path = write(tmp_path_factory.mktemp("text") / "p.txt", end.join(lines) + end * blanks)
    assert list(PromptSource(path)) == lines


def test_files_concatenate_in_sorted_order_each_once(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", f"{name}1\n{name}2\n")
    write(tmp_path / "notes.md", "not a prompt")
    write(tmp_path / ".a.txt", "left by an editor")
    expected = ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert list(PromptSource(tmp_path)) == expected
    assert list(PromptSource(str(tmp_path / "*.txt"))) == expected
    assert list(PromptSource([tmp_path / "c.txt", tmp_path / "b.txt", str(tmp_path / "[ab].txt")])) == expected
    source = PromptSource(tmp_path)
    assert [source.where(i) for i in (1, 4)] == [f"{tmp_path}/a.txt:2", f"{tmp_path}/c.txt:1"]
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]


BAD_LINES = [
    ("p.txt", b"good\n\n\nbetter\n", ":2: blank"),
    ("p.txt", b"good\n\xff\xfe\n", ":2: not UTF-8 (byte 0xff at offset 0"),
    ("p.txt", b"good\n\xe3\x80\x80\n", ":2: blank prompt"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"\n', ":3: broken JSON"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', ":2: blank"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', ":2: no key 'prompt' among [\"text\"]"),
    ("p.jsonl", b'{"prompt": 7}\n{"prompt": "a"}\n', ":1: key 'prompt' is not a string but 7"),
    ("p.jsonl", b'{"prompt": "a"}\n"b"\n', ":2: a JSON object with key 'prompt' is needed, not \"b\""),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', ":2: blank prompt"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', ":2: the prompt has a lone surrogate"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', ":2: not UTF-8 (byte 0xe4 at offset 12"),
    ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n", ":2: broken JSON"),
    ("p.jsonl", b'{"prompt": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", ":2: broken JSON"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_LINES, ids=lambda value: str(value)[:24])
def test_malformed_line(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    assert f"{path}{message}" in error_of(path)
    assert "skip_bad=True" in error_of(path)
    source = PromptSource(path, skip_bad=True)
    lines = [line for line in data.rstrip(b"\n").split(b"\n")]
    assert len(source) + source.num_skipped == len(lines)
    assert source.num_skipped >= 1
    assert source.first_skipped.startswith(f"{path}{message}")


def test_malformed_record_of_an_array_record_file(tmp_path):
    records = [b"a cat", b'{"prompt": "a dog"}', b"\xff", b'{"prompt": 3}', b"{a brace", b"", b"a cow"]
    path = array_record(tmp_path / "p.array_record", records)
    assert error_of(path).startswith(f"{path}: record 2: not UTF-8")
    source = PromptSource(path, skip_bad=True)
    assert list(source) == ["a cat", "a dog", "a cow"]
    assert source.num_skipped == 4
    assert source.where(2) == f"{path}: record 6"


@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_skip_bad_keeps_the_good_and_counts_the_rest(tmp_path_factory, good):
    lines = [json.dumps({"prompt": f"cat {i}"}) if ok else '{"prompt"' for i, ok in enumerate(good)]
    path = write(tmp_path_factory.mktemp("skip") / "p.jsonl", "\n".join(lines))
    source = PromptSource(path, skip_bad=True)
    assert list(source) == [f"cat {i}" for i, ok in enumerate(good) if ok]
    assert source.num_skipped == good.count(False)
    assert [source.where(i) for i in range(len(source))] == [f"{path}:{i + 1}" for i, ok in enumerate(good) if ok]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.array_record"])
def test_empty_and_missing_files(tmp_path, name):
    assert f"{name}: cannot be read (No such file or directory)" in error_of(tmp_path / name)
    write(tmp_path / name, b"")
    assert f"{name}: holds no prompts (it is empty" in error_of(tmp_path / name)
    # Also among others: a shard that holds nothing is a shard that was lost.
    write(tmp_path / "other.txt", "a cat\n")
    assert f"{name}: holds no prompts" in error_of([tmp_path / name, tmp_path / "other.txt"])


def test_files_without_any_good_record(tmp_path):
    path = write(tmp_path / "p.jsonl", "{\n[\n")
    assert "holds no prompts (all 2 records are malformed, first " in error_of(path, skip_bad=True)
    assert "holds no prompts (it is empty)" in error_of(write(tmp_path / "blank.txt", "\n\n \n"))


def test_a_cut_array_record_file(tmp_path):
    path = array_record(tmp_path / "p.array_record", [os.urandom(64).hex().encode() for _ in range(3000)])
    write(path, path.read_bytes()[: path.stat().st_size // 2])
    assert "cut short" in error_of(path) or "damaged" in error_of(path)


def test_paths_that_name_nothing(tmp_path):
    assert "no file matches" in error_of(tmp_path)
    assert "no file matches" in error_of(str(tmp_path / "*.txt"))
    assert "suffix '.csv' is unknown" in error_of(write(tmp_path / "p.csv", "a cat"))
    assert "is empty" in error_of("")
    assert "is empty" in error_of([])
    write(tmp_path / "a.txt", "a cat")
    write(tmp_path / "a.jsonl", jsonl(CATS))
    assert "several formats (.jsonl, .txt)" in error_of(tmp_path)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "p.jsonl", jsonl(CATS))
    source = PromptSource(path)
    with open(path, "r+b") as file:
        file.truncate(5)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: changed while it was in use")):
        source[1]


def test_a_file_that_is_deleted_stays_readable(tmp_path):
    path = write(tmp_path / "p.txt", "\n".join(CATS))
    source = PromptSource(path)
    path.unlink()
    assert list(source) == CATS


def test_threads_read_the_right_lines(tmp_path):
    expected = [f"cat {i} " + "x" * (i % 7) for i in range(500)]
    source = PromptSource(write(tmp_path / "p.txt", "\n".join(expected)))
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).permutation(len(source)):
            if source[index] != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@given(st.lists(LINE, min_size=1, max_size=9), st.integers(1, 9))
def test_written_shards_hold_the_prompts_in_order(tmp_path_factory, lines, shards):
    folder = tmp_path_factory.mktemp("shards") / "out"
    shards = min(shards, len(lines))
    files = prompts.write_prompts_array_record(lines, folder, shards)
    assert [file.name for file in files] == [f"prompts-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
    source = PromptSource(folder)
    assert list(source) == lines
    assert source.paths == files


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    for bad, message in [(["a cat", " "], "prompt 1 cannot be written: blank prompt"), (["\ud800"], "lone surrogate")]:
        with pytest.raises(UserError, match=message):
            prompts.write_prompts_array_record(bad, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    for shards in (0, 4):
        with pytest.raises(UserError, match=f"{shards} shards for 3 prompts"):
            prompts.write_prompts_array_record(CATS, tmp_path / "out", shards)
    prompts.write_prompts_array_record(CATS, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        prompts.write_prompts_array_record(CATS, tmp_path / "out")
    assert list(PromptSource(tmp_path / "out")) == CATS


@given(st.integers(2, 2000), st.floats(0.001, 0.99), st.integers(0, 2**40))
def test_split_is_a_partition_of_the_stated_size(count, fraction, seed):
    train, held_out = prompts.split_train_eval(count, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(count))
    assert len(held_out) == min(max(1, round(count * fraction)), count - 1)
    again = prompts.split_train_eval(count, fraction, seed)
    assert np.array_equal(again[1], held_out)


def test_split_depends_on_the_seed_and_spreads():
    splits = [prompts.split_train_eval(10_000, 0.1, seed)[1] for seed in range(20)]
    # Two independent tenths share a tenth of their members: 100 of 1000, standard deviation 9.
    shared = [len(np.intersect1d(a, b)) for i, a in enumerate(splits) for b in splits[:i]]
    assert 60 < min(shared) and max(shared) < 140
    # Held-out records in ten stretches of the file: 100 each, standard deviation 9.
    counts = np.concatenate([np.histogram(split, 10, (0, 10_000))[0] for split in splits])
    assert 60 < counts.min() and counts.max() < 140


def test_split_is_the_published_hash():
    """The same with Python's unbounded integers. Held-out sets belong to published results: they must not change."""
    start = int.from_bytes(hashlib.sha256(b"split 0").digest()[:8], "little")

    def splitmix64(index):
        z = (start + index + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    expected = sorted(sorted(range(12), key=splitmix64)[:4])
    assert prompts.split_train_eval(12, 0.34, 0)[1].tolist() == expected == [2, 4, 8, 11]


def test_split_rejects_what_it_cannot_split():
    assert len(prompts.split_train_eval(5, 0.0, 0)[1]) == 0
    for count, fraction, message in [(5, 1.0, "out of range"), (5, -0.1, "out of range"), (1, 0.5, "cannot be split")]:
        with pytest.raises(UserError, match=message):
            prompts.split_train_eval(count, fraction, 0)
