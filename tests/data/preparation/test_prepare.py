"""From files to a store: every format gives the same bytes, whoever does the work and however often it is killed."""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import random
import signal
import time
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pst_ds.data import file_rows
from pst_ds.data.preparation import pieces as pieces_module
from pst_ds.data.preparation import prepare as prepare_module
from pst_ds.data.preparation.pieces import Reading, find_pieces
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.data.preparation.readers import texts_of
from pst_ds.data.tokens.arrays import between
from pst_ds.data.tokens.store import open_store
from pst_ds.data.tokens.tokenize import tokenize
from pst_ds.errors import InputError
from tests.pairs import every_pair

TINY = Path(__file__).resolve().parents[1] / "tiny-llama"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
WORDS = ("film", "plot", "warm", "dull", "the")
DOCUMENTS = ["the warm film", "the dull plot, the film", "", "NA", 'a "quoted" plot', "  ", "film,\twarm", "é œuvre"]


@pytest.fixture(autouse=True)
def _own_cache(alone):
    """A cache of datasets of its own."""


def _write(path, texts, column="text"):
    """Write ``texts`` with libraries that are not ours; the name's ending says how."""
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(len(texts))), column: texts})
    name = path.name.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2").removesuffix(".zst")
    kind = name.rpartition(".")[2]
    if kind == "jsonl":
        data = "".join(json.dumps({"n": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    elif kind == "json":
        data = json.dumps([{column: text} for text in texts]).encode()
    elif kind == "txt":
        data = ("\n".join(texts) + "\n").encode()
    elif kind == "tsv":
        data = "".join(f"{i}\t{text}\n" for i, text in [("n", column), *enumerate(texts)]).encode()
    elif kind == "saved":
        rows.save_to_disk(str(path))
        return path
    else:
        getattr(rows, {"csv": "to_csv", "parquet": "to_parquet"}[kind])(path.with_name("plain"))
        data = path.with_name("plain").read_bytes()
        path.with_name("plain").unlink()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": _zstd}
    path.write_bytes(packers.get(path.suffix, bytes)(data))
    return path


def _zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


def _texts(source, reading=None, piece_bytes=1 << 20):
    reading = reading or Reading()
    found = find_pieces([str(source)], reading, piece_bytes)
    return [text for piece in found for span in piece for batch in texts_of(span, reading) for text in batch]


def _store(sources, out, *, workers=1, piece_bytes=200, force=False, reading=None, **options):
    plan = plan_store(list(map(str, sources)), TOKENIZER, reading or Reading(), piece_bytes=piece_bytes, **options)
    return prepare_store(plan, TOKENIZER, out, num_workers=workers, force=force)


def _bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _many(path, count=300, seed=0):
    draw = random.Random(seed)
    return _write(path, [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)])


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl", "a.json", "a.csv", "a.parquet", "a.saved", "a.jsonl.gz", "a.jsonl.zst", "a.csv.xz", "a.json.bz2",
        "a.parquet.gz",
    ],
)  # fmt: skip
def test_every_format_gives_its_texts(tmp_path, name):
    path = _write(tmp_path / name, DOCUMENTS)
    assert _texts(path) == DOCUMENTS


def test_quotes_of_a_tsv_are_characters(tmp_path):
    texts = ["the film", 'a "quoted" plot', '"the film"', "NA"]
    assert _texts(_write(tmp_path / "a.tsv", texts)) == texts


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])
def test_a_tsv_that_was_written_with_quotes_is_refused(tmp_path, quoting):
    """As when training reads it: the quotes were tokenised."""
    path = tmp_path / "a.tsv"
    with path.open("w", newline="") as file:
        rows = [("text", "n"), ("the film", 0), ('a "quoted" plot', 1)]
        csv.writer(file, delimiter="\t", quoting=quoting).writerows(rows)
    with pytest.raises(InputError, match=r"a\.tsv was written with quotes around its .*Save it without them"):
        _texts(path)
    path.write_text('n\ttext\n0\t"the film"\n1\t"a plot"\n')
    with pytest.raises(InputError, match=r"a\.tsv was written with quotes around its values in column 'text'"):
        _texts(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_joined_compressed_files_are_read_to_their_end(tmp_path, name, ending):
    """As pzstd, bgzip and cat write them: each part is a stream of its own."""
    texts = ["the film", "the plot", "warm"]
    path = _write(tmp_path / f"{name}{ending}", texts)
    more = tmp_path / f"more{ending}"
    unpacked = _write(tmp_path / name, texts).read_bytes()
    more.write_bytes(unpacked.partition(b"\n")[2] if name == "a.csv" else unpacked)
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": _zstd}
    path.write_bytes(path.read_bytes() + packers[ending](more.read_bytes()))
    assert _texts(path) == texts * 2


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_a_compressed_file_that_was_cut_is_refused(tmp_path, ending):
    """As an interrupted download leaves it."""
    draw = random.Random(0)
    path = _write(tmp_path / f"a.jsonl{ending}", [str(draw.random()) for _ in range(2000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        _texts(path)


def test_hidden_files_of_a_folder_and_its_dataset_card_are_not_text(tmp_path):
    """Notebooks keep copies in .ipynb_checkpoints, and datasets of the hub come with a README.md."""
    _write(tmp_path / "a.jsonl", ["film"])
    for hidden in (".ipynb_checkpoints", "b/.cache/huggingface"):
        (tmp_path / hidden).mkdir(parents=True)
        _write(tmp_path / hidden / "copy.jsonl", ["copy"])
    _write(tmp_path / ".copy.jsonl", ["copy"])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert _texts(tmp_path) == ["film"]
    assert _texts(tmp_path / ".ipynb_checkpoints") == ["copy"]  # named as such
    (tmp_path / "a.jsonl").unlink()
    assert _texts(tmp_path) == ["---", "license: mit", "---"]


@every_pair
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("breaks", ["\n", "\r\n", "\r"])
def test_plain_text_is_read_as_datasets_reads_it(tmp_path, sample_by, breaks):
    """Apart from a third line break in a row, which datasets makes the start of the next paragraph."""
    import datasets

    text = "the film\nis warm\n\nthe plot\n\n\n\nis dull\n\n\nend"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", breaks).encode())
    rows = datasets.load_dataset("text", data_files=str(tmp_path / "a.txt"), split="train", sample_by=sample_by)
    found = [text for text in _texts(tmp_path / "a.txt", Reading(sample_by=sample_by)) if text.strip()]
    if sample_by == "paragraph":
        assert found == [row.strip("\n") for row in rows["text"] if row.strip()]
    else:
        assert found == [row for row in rows["text"] if row.strip()]


@given(
    st.lists(st.sampled_from(["film", "é", "\n", "\n", "plot "]), max_size=60).map("".join),
    st.integers(1, 40),
    st.sampled_from(["line", "paragraph"]),
    st.integers(1, 30),
)
def test_a_text_cut_anywhere_has_the_same_documents(tmp_path_factory, text, piece_bytes, sample_by, look):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(text, encoding="utf-8")
    reading = Reading(sample_by=sample_by)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "_LOOK_BYTES", look)
        patch.setattr(file_rows, "_BLOCK_BYTES", look)
        cut = [text for text in _texts(path, reading, piece_bytes) if text]
    parts = text.split("\n" if sample_by == "line" else "\n\n")
    if sample_by == "paragraph":
        parts = [part.strip("\n") for part in parts]
    assert cut == [part for part in parts if part]


def test_large_files_are_cut_and_small_ones_gathered(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for i in range(6):
        _write(folder / f"{i}.jsonl", ["film"])  # 26 bytes each
    _many(folder / "b" / "large.jsonl")
    (folder / "notes.docx").write_text("no text")
    found = find_pieces([str(folder)], Reading(), 60)
    assert [[Path(span.path).name for span in piece] for piece in found[:3]] == [
        ["0.jsonl", "1.jsonl"], ["2.jsonl", "3.jsonl"], ["4.jsonl", "5.jsonl"],
    ]  # fmt: skip
    large = [span for piece in found[3:] for span in piece]
    assert [(a.stop, b.start) for a, b in itertools.pairwise(large)] == [(span.stop, span.stop) for span in large[:-1]]
    assert large[-1].stop == (folder / "b" / "large.jsonl").stat().st_size
    assert find_pieces([str(folder / "*.jsonl")], Reading(), 60) == found[:3]
    assert find_pieces([str(folder / f"{i}.jsonl") for i in range(6)], Reading(), 60) == found[:3]


def test_the_store_is_one_stream_with_the_end_between_documents(tmp_path):
    _store([_write(tmp_path / "a.jsonl", DOCUMENTS)], tmp_path / "s", count_bytes=True, piece_bytes=30)
    stream = open_store(tmp_path / "s")
    whole = tokenize(DOCUMENTS, TOKENIZER, count=True)
    assert stream.tokens[:].tolist() == whole.tokens.tolist()[:-1]
    assert stream.num_bytes[:].tolist() == whole.num_bytes.tolist()[:-1]
    assert len(between(stream.borders, 0, len(stream))) == len([text for text in DOCUMENTS if text.strip()])


@pytest.mark.few(1)
def test_a_row_without_text_is_numbered_from_the_start_of_a_parquet_file(tmp_path):
    """From 0, as when training reads it; also in a later piece, which starts inside the file."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    texts = ["the warm film", "the plot", "dull", None]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path, row_group_size=1)
    reading = Reading()
    *_, (last,) = find_pieces([str(path)], reading, 1)
    with pytest.raises(InputError, match=r"a\.parquet: column 'text' has no text in row 3\. "):
        list(texts_of(last, reading))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.saved"])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, name):
    path = _many(tmp_path / name)
    for workers in (1, 2, 3):
        _store([path], tmp_path / f"s{workers}", workers=workers, piece_bytes=700)
    one, two, three = (_bytes_of(tmp_path / f"s{workers}") for workers in (1, 2, 3))
    assert one == two == three
    assert len(one) > 3 or name == "a.parquet"


def _killed(sources, out, workers, after, piece_bytes=700):
    """Prepare in a child that is killed when it has done ``after`` batches of texts; False if it ended before."""
    pid = os.fork()
    if not pid:
        calls = iter(range(10**6))
        tokenizes = prepare_module.tokenize_texts

        def stopping(*arguments, **options):
            if next(calls) == after:
                os.kill(parent if workers > 1 else os.getpid(), signal.SIGKILL)
            return tokenizes(*arguments, **options)

        parent = os.getpid()
        prepare_module.tokenize_texts = stopping
        try:
            _store(sources, out, workers=workers, piece_bytes=piece_bytes)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.few(1)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, workers):
    path = _many(tmp_path / "a.jsonl")
    _store([path], tmp_path / "whole", piece_bytes=400)
    draw, kills = random.Random(5), 0
    while _killed([path], tmp_path / "s", workers, draw.randint(0, 2), 400):
        kills += 1
        assert not (tmp_path / "s").exists()
    assert kills > (workers == 1)  # of two, how many depends on which gets how far
    assert _bytes_of(tmp_path / "s") == _bytes_of(tmp_path / "whole")
    assert not (tmp_path / "s.partial").exists()


def test_finished_shards_are_not_made_again(tmp_path, monkeypatch):
    path = _many(tmp_path / "a.jsonl")
    assert _killed([path], tmp_path / "s", 1, 6)
    there = sorted(file.name for file in (tmp_path / "s.partial").glob("shard-*"))
    assert len(there) == 6
    made = []
    shard_writer = prepare_module.ShardWriter
    monkeypatch.setattr(prepare_module, "ShardWriter", lambda *a: made.append(a[1]) or shard_writer(*a))
    _store([path], tmp_path / "s", piece_bytes=700)
    assert made == list(range(6, max(made) + 1))


def test_killed_while_it_publishes_it_only_publishes(tmp_path, monkeypatch):
    path = _many(tmp_path / "a.jsonl")

    def fail(*_):
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", fail)
        with pytest.raises(OSError, match="no power"):
            _store([path], tmp_path / "s", piece_bytes=700)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize_texts", fail)
        _store([path], tmp_path / "s", piece_bytes=700)
    _store([path], tmp_path / "whole", piece_bytes=700)
    assert _bytes_of(tmp_path / "s") == _bytes_of(tmp_path / "whole")


def test_a_dead_worker_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    path, tokenizes, first = _many(tmp_path / "a.jsonl"), prepare_module.tokenize_texts, os.getpid()

    def dying(*arguments, **options):
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenizes(*arguments, **options)

    monkeypatch.setattr(prepare_module, "tokenize_texts", dying)
    with pytest.raises(RuntimeError, match="a worker was killed"):
        _store([path], tmp_path / "s", workers=2, piece_bytes=700)
    monkeypatch.undo()
    _store([path], tmp_path / "s", workers=2, piece_bytes=700)
    assert (tmp_path / "s").is_dir()


def test_workers_end_with_the_process_that_began_them(tmp_path):
    """The kernel kills them with it."""
    path = _many(tmp_path / "a.jsonl")
    assert _killed([path], tmp_path / "s", 2, 1)
    deadline, count = time.monotonic() + 60, -1
    while time.monotonic() < deadline and count != len(_children_with(str(tmp_path))):
        count = 0
    assert _children_with(str(tmp_path)) == []


def _children_with(word):
    """Processes that have a file open below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if word in os.readlink(process):
                found.append(process)
        except OSError:
            continue
    return found


def test_a_store_and_a_half_of_another_are_not_overwritten(tmp_path):
    path, other = _many(tmp_path / "a.jsonl"), _many(tmp_path / "b.jsonl", seed=1)
    _store([path], tmp_path / "s")
    with pytest.raises(InputError, match=r"is a finished store\. Replace it with force = true"):
        _store([other], tmp_path / "s")
    _store([other], tmp_path / "s", force=True)
    assert _killed([path], tmp_path / "t", 1, 2)
    with pytest.raises(InputError, match="an unfinished store of other sources"):
        _store([other], tmp_path / "t", piece_bytes=700)
    _store([other], tmp_path / "t", force=True)
    assert _bytes_of(tmp_path / "s") == _bytes_of(tmp_path / "t")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(InputError, match="a folder with other files"):
        _store([path], tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_sources_that_changed_are_not_mixed(tmp_path):
    path = _many(tmp_path / "a.jsonl")
    assert _killed([path], tmp_path / "s", 1, 2)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="an unfinished store of other sources"):
        _store([path], tmp_path / "s", piece_bytes=700)


def _file(name, content):
    return lambda folder: [(folder / name).write_bytes(content), [folder / name]][1]


@every_pair
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: [f / "no.jsonl"], ["no.jsonl' does not exist (looked in", "Name a file"]),
        (lambda f: [f / "*.jsonl"], ["*.jsonl' matches no file", "patterns"]),
        (lambda f: [f], ["has no file of a known kind", ".parquet"]),
        (_file("a.docx", b"x"), ["a.docx' is of an unknown kind", ".jsonl"]),
        (_file("a.jsonl", b'{"text": "a"}\n{"text": \n'), ["a.jsonl: line 2 is not a JSON object", "Repair"]),
        (_file("a.jsonl", b'{"text": "a"}\n[1]\n'), ["a.jsonl: line 2 is not a JSON object (it is a list)"]),
        (_file("a.jsonl", b'{"body": "a"}\n'), ["a.jsonl: line 1 has no column 'text'", "Reading.column", "body"]),
        (_file("a.jsonl", b'{"text": null}\n'), ["a.jsonl: column 'text' has no text in line 1", "remove the row"]),
        (_file("a.jsonl", b'{"text": ["a"]}\n'), ["a.jsonl: column 'text' has a list in line 1"]),
        (_file("a.csv", b"body\na\n"), ["a.csv has no column 'text'", "Columns: body"]),
        (_file("a.csv", b"text,n\na,1\nb,2,3\n"), ["a.csv: line 3 has 3 fields", "2 columns"]),
        (_file("a.txt", b"caf\xe9\n"), ["a.txt: line 1 is not UTF-8", "0xe9", "Save it"]),
        (_file("a.jsonl", b'{"text": "caf\xe9"}\n'), ["a.jsonl: line 1 is not UTF-8", "0xe9"]),
        (_file("a.parquet", b"text"), ["a.parquet cannot be read as parquet", "Name another file"]),
        (_file("a.jsonl.gz", b"no gzip"), ["a.jsonl.gz cannot be read", "Repair it"]),
        (_file("a.jsonl", b'{"text": " "}\n'), ["there is only white space"]),
        (_file("a.jsonl", b""), ["nothing to read", "a.jsonl"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_read_is_refused(tmp_path, make, words, workers):
    (tmp_path / "in").mkdir()
    (tmp_path / "more.jsonl").write_text('{"text": "film"}\n')
    white = any("white space" in word or "nothing" in word for word in words)
    sources = [*make(tmp_path / "in"), *([] if white else [tmp_path / "more.jsonl"])]
    with pytest.raises(InputError) as caught:
        _store(sources, tmp_path / "s", workers=workers, piece_bytes=1)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_csv_rows_may_span_lines(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], ["the film\nis warm", 1], ['a "plot"', 2]])
    assert _texts(tmp_path / "a.csv", piece_bytes=1) == ["the film\nis warm", 'a "plot"']


def test_another_column_and_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"body": "film"}\n\n{"body": 3}\n', encoding="utf-8")
    assert _texts(tmp_path / "a.jsonl", Reading(column="body")) == ["film", "3"]
