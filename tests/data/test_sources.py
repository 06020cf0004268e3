import datetime
import decimal
import gzip
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from etils import epath

from jax_it.config import Source
from jax_it.data import builtin, records, sources
from jax_it.errors import UserError

RECORDS = [
    {"prompt": "Say é.", "completion": "é"},
    {"prompt": "Two\nlines, a \"quote\"", "completion": "yes"},
    {"prompt": "漢字", "completion": ""},
]  # fmt: skip


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def csv_text(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    quoted = (delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    return "\r\n".join(quoted).encode()


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": jsonl,
    "a.json": lambda records: json.dumps(records, indent=2).encode(),
    "lines.json": jsonl,
    "a.jsonl.gz": lambda records: gzip.compress(jsonl(records)),
    "members.jsonl.gz": lambda records: b"".join(gzip.compress(jsonl([record])) for record in records),
    "a.json.gz": lambda records: gzip.compress(json.dumps(records).encode()),
    "a.jsonl.zst": lambda records: zst(jsonl(records)),
    "frames.jsonl.zst": lambda records: b"".join(zst(jsonl([record])) for record in records),
    "a.json.zst": lambda records: zst(b"\n [" + b",\n".join(map(str.encode, map(json.dumps, records))) + b"]"),
    "a.csv": csv_text,
    "excel.csv": lambda records: b"\xef\xbb\xbf" + csv_text(records),
    "a.csv.gz": lambda records: gzip.compress(csv_text(records)),
    "a.tsv": lambda records: csv_text(records, "\t"),
    "a.parquet": parquet,
    "mark.jsonl": lambda records: b"\xef\xbb\xbf" + jsonl(records),
    "windows.jsonl": lambda records: jsonl(records).replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda records: b"\n \n" + jsonl(records).replace(b"\n", b"\n\n"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        return path

    return write


def fields(path: Path | str, **settings: Any) -> list[dict[str, Any]]:
    return [record.fields for record in sources.read(Source(str(path), **settings))]


def refusal(path: Path | str, where: str = "config.data.train.0", **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(sources.read(Source(str(path), **settings), where))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What can be read


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records_in_their_order(write, name):
    assert fields(write(name, FORMATS[name](RECORDS))) == RECORDS


def test_records_know_their_file_and_line(write):
    (write("d/a.jsonl", b'\n{"a": 1}\n\n{"a": 2}\n'), write("d/b.json", b'[{"a": 3}]'))
    folder = write("d/c.jsonl", b'{"a": 4}').parent
    places = [record.where.removeprefix(f"{folder}/") for record in sources.read(Source(str(folder)))]
    assert places == ["a.jsonl, line 2", "a.jsonl, line 4", "b.json, record 1", "c.jsonl, line 1"]
    table = write("a.csv", b'a,b\n1,"two\nlines"\n3,4\n')
    assert [r.where for r in sources.read(Source(str(table)))] == [f"{table}, line 3", f"{table}, line 4"]
    table = write("a.parquet", parquet(RECORDS))
    assert [r.where for r in sources.read(Source(str(table)))] == [f"{table}, row {i}" for i in (1, 2, 3)]


def test_a_folder_and_a_glob_are_read_file_by_file_in_the_order_of_their_names(write):
    for name, value in (("b.jsonl", 2), ("a.jsonl.gz", 1), ("c.jsonl", 3)):
        content = b'{"a": %d}\n' % value
        folder = write(f"d/{name}", gzip.compress(content) if name.endswith("gz") else content).parent
    write("d/README.md", b"# not data")
    write("d/deep/er.jsonl", b'{"a": 4}')
    assert fields(folder) == fields(f"{folder}/") == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert fields(f"{folder}/[bc].jsonl") == [{"a": 2}, {"a": 3}]
    assert fields(f"{folder}/**/*.jsonl") == [{"a": 2}, {"a": 3}, {"a": 4}]


def test_a_stated_format_goes_before_the_name_and_chooses_in_a_folder(write):
    assert fields(write("a.txt", jsonl(RECORDS)), format="json") == RECORDS
    write("d/a.csv", csv_text(RECORDS))
    folder = write("d/b.jsonl", jsonl(RECORDS[:1])).parent
    assert fields(folder, format="csv") == RECORDS and fields(folder, format="json") == RECORDS[:1]
    assert "cannot tell the format" in refusal(folder)


def test_a_path_may_begin_with_the_home_folder(write, tmp_path, monkeypatch):
    write("a.jsonl", jsonl(RECORDS))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fields("~/a.jsonl") == fields("~/*.jsonl") == RECORDS


@pytest.mark.parametrize("limit, expected", [(0, 3), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_a_limit_takes_records_from_the_start(write, limit, expected):
    assert fields(write("a.jsonl", jsonl(RECORDS)), limit=limit) == RECORDS[:expected]


def test_what_comes_after_the_limit_is_not_looked_at(write):
    assert fields(write("a.jsonl", jsonl(RECORDS[:2]) + b"{broken"), limit=2) == RECORDS[:2]


def test_the_built_in_set_is_read_by_split():
    assert fields("builtin:instructions", split="test", limit=3) == builtin.records("test")[:3]
    assert "no built-in data set builtin:instruction;" in refusal("builtin:instruction")


@pytest.mark.parametrize(
    "path, name",
    [("data/train.jsonl.gz", "train"), ("org/set", "set"), ("builtin:instructions", "builtin:instructions")],
)
def test_a_data_set_is_called_by_its_file_unless_it_has_a_name(path, name):
    assert sources.name_of(Source(path)) == name and sources.name_of(Source(path, name="mine")) == "mine"


# Through datasets.load_dataset: in a process of its own, which keeps the library's caches and threads out of this one.

LOAD = """
import json, sys
from jax_it.config import Source
from jax_it.data import sources
from jax_it.errors import UserError
out = []
for settings in json.loads(sys.argv[1]):
    source = Source(format="datasets", **settings)
    try:
        records = list(sources.read(source, "config.data.train.0"))
        out.append([[r.fields for r in records], [r.where for r in records], sources.digest(source)])
    except UserError as error:
        out.append(str(error))
print(json.dumps(out))
"""


def test_a_local_folder_is_read_by_the_datasets_library(write, tmp_path):
    folder = write("set/train.parquet", parquet(RECORDS)).parent
    write("set/test.parquet", parquet(RECORDS[:1]))
    asked = [
        {"path": str(folder)},
        {"path": str(folder), "split": "test"},
        {"path": str(folder), "split": "train[:2]"},
        {"path": str(folder), "split": "validation"},
        {"path": "no-such/data-set"},
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", LOAD, json.dumps(asked)]
    run = subprocess.run(command, env=os.environ | offline, stdout=subprocess.PIPE, check=True)
    train, test, two, no_split, no_set = json.loads(run.stdout)
    assert train[:2] == [RECORDS, [f"{folder} (train), row {i}" for i in (1, 2, 3)]]
    assert (test[0], two[0]) == (RECORDS[:1], RECORDS[:2]) and len({train[2], test[2], two[2]}) == 3
    assert no_split.startswith(f"config.data.train.0: data set '{folder}' (subset '', split 'validation') could not be")
    assert no_set.startswith("config.data.train.0: data set 'no-such/data-set' (subset '', split 'train') could not be")


# What cannot


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_malformed_json_is_refused_with_its_line_and_a_remedy(write, suffix):
    content = jsonl(RECORDS[:2]) + b'\n{"prompt": "x", "completion": }\n' + jsonl(RECORDS)
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zst}[suffix]
    path = write(f"a.{suffix}", pack(content))
    assert refusal(path).startswith(f"{path}, line 4: not valid JSON (Expecting value: line 1 column 31")
    assert refusal(path).endswith("fix or remove the line")


@pytest.mark.parametrize("content, kind", [(b"5", "int"), (b'"text"', "str"), (b"null", "NoneType")])
def test_a_line_that_is_no_object_is_refused(write, content, kind):
    path = write("a.jsonl", jsonl(RECORDS[:1]) + content)
    assert refusal(path) == f"{path}, line 2: expected an object with fields, got {kind}"
    path = write("a.json", b"[{}, " + content + b"]")
    assert refusal(path) == f"{path}, record 2: expected an object with fields, got {kind}"


def test_a_malformed_json_list_is_refused_with_its_line(write):
    path = write("a.json", b'\n\n[{"a": 1},\n {"a": 2},\n {"a" 3}]')
    assert refusal(path).startswith(f"{path}, record 3: not valid JSON (Expecting ':' delimiter: line 5 column 7")
    for content, reason in (
        ("[{}", "Expecting ',' delimiter"), ("[{},]", "Expecting value"), ("[{}] x", "Extra data"), ("[", "Expecting"),
        ("[{} {}]", "Expecting ',' delimiter"), ("[{}]]", "Extra data"), ("[,]", "Expecting value"),
    ):  # fmt: skip
        assert f"not valid JSON ({reason}" in refusal(write("b.json", content.encode()))
    assert fields(write("b.json", b' [ {"a": [1]} ,\n{} ] \n')) == [{"a": [1]}, {}]


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("zst", zst)])
@pytest.mark.parametrize("kept", [0.5, -1])
def test_a_truncated_archive_is_refused_and_not_read_half(write, suffix, pack, kept):
    whole = pack(os.urandom(1 << 16).hex().join(['{"a": "', '"}\n']).encode() * 4)
    path = write(f"a.jsonl.{suffix}", whole[: int(kept * len(whole)) if kept > 0 else kept])
    assert refusal(path).startswith(f"{path} cannot be read: Compressed file ended before the end")


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("zst", zst)])
def test_a_damaged_archive_is_refused(write, suffix, pack):
    whole = pack(jsonl(RECORDS * 1000))
    path = write(f"a.jsonl.{suffix}", whole[:10] + b"\xff" * 20 + whole[30:])
    assert refusal(path).startswith(f"{path} cannot be read: ")
    path = write(f"b.jsonl.{suffix}", b"plain text")
    assert refusal(path).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz"])
def test_text_that_is_not_utf8_is_refused_with_its_line(write, suffix):
    lines = ['{"a": "ä"}', '{"a": "b"}'] if suffix != "csv" else ["a,b", "ä,b"]
    content = "\n".join(lines[:1]).encode() + b"\n" + "\n".join(lines[::-1]).encode("latin-1")
    path = write(f"a.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    line = 2 if suffix == "csv" else 3
    assert refusal(path) == f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8"


@pytest.mark.parametrize(
    "content, line, reason",
    [
        (b"a,b\n1,2\n3\n", 3, "expected 2 columns"),
        (b"a,b\n1,2,3\n", 2, "expected 2 columns"),
        (b'a,b\n1,"two\nlines"\n3,4,5\n', 4, "expected 2 columns"),
        (b'a,b\n1,"2" 3\n', 2, "not valid CSV ("),
        (b'a,b\n1,"2\n', 2, "not valid CSV ("),
    ],
)
def test_a_csv_line_that_does_not_fit_is_refused(write, content, line, reason):
    path = write("a.csv", content)
    assert refusal(path).startswith(f"{path}, line {line}: {reason}") and refusal(path).endswith("fix the line")


def test_a_parquet_file_that_is_none_is_refused(write):
    path = write("a.parquet", b"PAR1 and nothing more")
    assert refusal(path).startswith(f"{path} cannot be read after row 0: ")


@pytest.mark.parametrize(
    "name, content",
    [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.csv", b""), ("a.csv", b"prompt,completion\n"),
     ("a.jsonl.gz", b""), ("a.jsonl.gz", gzip.compress(b"", mtime=0)), ("a.jsonl.zst", b""), ("a.jsonl.zst", zst(b"")),
     ("a.parquet", parquet(RECORDS[:1])[:0] + parquet([]))],
)  # fmt: skip
def test_an_empty_file_is_refused_with_the_name_of_its_setting(write, name, content):
    path = write(name, content)
    assert refusal(path) == f"{path} holds no records; remove it from config.data.train.0 or add some"


def test_an_absent_file_is_refused_and_not_looked_for_on_the_hub(tmp_path):
    for path in (tmp_path / "absent.jsonl", "absent.jsonl", "data/absent.csv", "./absent", "~/absent"):
        assert refusal(path) == f"config.data.train.0: data file {path} does not exist"
    assert refusal("org/set-v1.1").endswith(
        "does not exist; if it is a data set of the hub, set its format to 'datasets'"
    )
    assert refusal("absent", format="json") == "config.data.train.0: no data file matches absent"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(
        f"config.data.train.0: the folder {tmp_path}/empty holds no data files (.jsonl, "
    )


def test_an_unknown_suffix_is_refused_with_the_known_ones(write):
    path = write("a.txt", jsonl(RECORDS))
    assert refusal(path).startswith(
        f"config.data.train.0: cannot tell the format of {path} from its name; use .jsonl, .json, .csv, .tsv, .parquet"
    )


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', ", line 2: an object has the key 'a' more than once"),
        ("a.json", b'[{"a": 1}, {"c": [{"b": 2, "b": 2}]}]', ", record 2: an object has the key 'b' more than once"),
        ("a.csv", b"a,b,a,b\n1,2,3,4\n", ", line 1: columns have the same name: 'a', 'b'"),
        ("a.tsv", b"a\ta\n1\t2\n", ", line 1: columns have the same name: 'a'"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(write, name, content, place):
    path = write(name, content)
    assert refusal(path).startswith(f"{path}{place}; ")


def arrow(columns: dict[str, Any], names: list[str] | None = None) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays(list(columns.values()), names or list(columns))
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_two_parquet_columns_of_one_name_are_refused(write):
    path = write("a.parquet", arrow({"a": pyarrow.array([1]), "b": pyarrow.array([2])}, ["a", "a"]))
    assert refusal(path) == f"{path}: columns have the same name: 'a'; rename or remove one"


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string()),
        pyarrow.array([0, 1], pyarrow.timestamp("s", "No/Where")),
        pyarrow.array([0, 2**62], pyarrow.timestamp("us")),
        pyarrow.array([0, 2**31 - 1], pyarrow.date32()),
        pyarrow.array([0, 2**62], pyarrow.duration("s")),
        pyarrow.StructArray.from_arrays([pyarrow.array([1, 2])] * 2, ["x", "x"]),
    ],
    ids=lambda column: str(column.type).replace(" ", ""),
)
def test_a_parquet_value_that_python_has_none_for_is_refused_with_its_row_and_column(write, column):
    path = write("a.parquet", arrow({"fine": pyarrow.array(["a", "b"]), "odd": column}))
    assert re.match(rf"{path}, row [12], column 'odd' cannot be read: \w+: ", refusal(path))


def test_parquet_decimals_dates_and_nested_values_are_read(write):
    day, value = datetime.date(2024, 2, 29), decimal.Decimal("1.50")
    nested = pyarrow.array([[{"x": [1, None]}]])
    columns = {"day": pyarrow.array([day]), "value": pyarrow.array([value]), "nested": nested}
    path = write("a.parquet", arrow(columns))
    assert fields(path) == [{"day": day, "value": value, "nested": [{"x": [1, None]}]}]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_is_nested_too_deeply_is_refused(write, suffix):
    deep = b"[" * 100_000 + b"]" * 100_000
    path = write(f"a.{suffix}", b'{"a": ' + deep + b"}" if suffix == "jsonl" else deep)
    assert "not valid JSON (nested too deeply); fix or remove the" in refusal(path)


def test_what_is_no_regular_file_is_refused_and_never_waited_for(write, tmp_path):
    folder = write("d/a.jsonl", jsonl(RECORDS)).parent
    os.mkfifo(folder / "b.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    write("e/f.jsonl/a.jsonl", jsonl(RECORDS))
    for path, file, what in (
        (folder / "b.jsonl", folder / "b.jsonl", "a pipe"),
        (folder, folder / "b.jsonl", "a pipe"),
        (f"{folder}/*.jsonl", folder / "b.jsonl", "a pipe"),
        (f"{tmp_path}/gone.*", tmp_path / "gone.jsonl", "a broken link"),
        (f"{tmp_path}/loop.*", tmp_path / "loop.jsonl", "a broken link"),
        (tmp_path / "e", tmp_path / "e/f.jsonl", "a folder"),
    ):
        reason = f"config.data.train.0: {file} is {what}, not a regular file, which can be read more than once"
        assert refusal(path) == refusal(path, format="json") == reason
    assert "/dev/zero is a device or socket" in refusal("/dev/zero", format="json")


def test_a_name_that_no_file_can_have_is_refused(write, tmp_path):
    for name in ("x" * 300, "a\0b", "\ud800"):
        assert refusal(f"{tmp_path}/{name}.jsonl").startswith("config.data.train.0.path ")
        assert refusal(f"{tmp_path}/{name}.jsonl", format="json").startswith("config.data.train.0.path ")
        listed = write("names.txt", name.encode(errors="surrogatepass"))
        assert refusal(tmp_path, file_list=str(listed)).startswith("config.data.train.0.file_list: ")
    assert refusal(tmp_path, file_list=str(write("names.txt", b"\n"))).endswith("lists no files; write one per line")


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("zst", zst)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_archive_that_unpacks_to_one_endless_line_is_refused(write, monkeypatch, suffix, pack, name):
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    path = write(f"{name}.{suffix}", pack(b"ab\n" + b"a" * 10_000))
    if name == "a.jsonl":
        path = write(f"{name}.{suffix}", pack(b'{"a": 1}\n' + b"a" * 10_000))
    assert refusal(path) == f"{path}, line 2: a line of more than 1000 characters; split the file's lines"


def test_a_json_list_that_is_too_long_to_hold_is_refused(write, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST_LIST", 1000)
    path = write("a.json", b"[{},\n" + b" " * 2000)
    assert refusal(path) == f"{path}: more than 1000 characters in one JSON value; write a record on each line"
    assert "more than 1000 characters" in refusal(path, records="a")


def test_a_small_zst_file_is_unpacked_in_small_pieces(write):
    path = write("a.jsonl.zst", zst(b" " * (1 << 26) + b"\n" + jsonl(RECORDS)))
    with path.open("rb") as stream:
        assert max(map(len, records._unzstd(stream))) <= 1 << 25


@pytest.mark.parametrize(
    "name, settings",
    [
        ("a.jsonl", {"split": "test"}), ("a.jsonl", {"subset": "en"}), ("a.jsonl", {"revision": "v1"}),
        ("builtin:instructions", {"max_per_file": 1}), ("builtin:instructions", {"records": "a"}),
        ("builtin:instructions", {"subset": "en"}),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused(write, name, settings):
    path = name if ":" in name else write(name, jsonl(RECORDS))
    (field,) = settings
    assert refusal(path, **settings).startswith(f"config.data.train.0.{field} is for ")
    with pytest.raises(UserError, match=rf"\.{field} is for "):
        digest(path, **settings)


# Revisions of hub data sets, with the hub's and the library's calls replaced

OLD, NEW = "a" * 40, "b" * 40


class _Rows(list[dict[str, Any]]):
    info: Any
    _fingerprint: str


@pytest.fixture
def hub(monkeypatch):
    """A hub whose `main` is at commit NEW and whose tag v1 is OLD; what is loaded is kept in the list."""
    loaded: list[dict[str, Any]] = []
    cached: list[str] = []

    def load(path: str, subset: str | None, split: str, revision: str | None) -> Any:
        loaded.append({"path": path, "revision": revision})
        found = cached[0] if cached else {None: NEW, "v1": OLD}.get(revision, revision)
        rows = _Rows([{"prompt": "a", "completion": "b"}])
        rows.info = types.SimpleNamespace(download_checksums={f"hf://datasets/{path}@{found}/a.parquet": {}})
        rows._fingerprint = f"fingerprint of {found}"
        return rows

    class Api:
        def dataset_info(self, path: str, revision: str | None) -> Any:
            return types.SimpleNamespace(sha={None: NEW, "v1": OLD}[revision])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return types.SimpleNamespace(loaded=loaded, cached=cached)


def test_a_revision_is_resolved_to_its_commit_and_read(hub, monkeypatch):
    assert sources.commit(Source("org/set")) == NEW and sources.commit(Source("org/set", revision="v1")) == OLD
    assert sources.commit(Source("org/set", revision=OLD)) == ""
    with pytest.raises(UserError, match=r"data set 'org/set' \(subset '', split 'train', revision 'v2'\) could not be"):
        sources.commit(Source("org/set", revision="v2"))
    assert fields("org/set", revision=OLD) and hub.loaded == [{"path": "org/set", "revision": OLD}]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sources.commit(Source("org/set", revision="v1")) == ""


def test_a_name_that_cannot_be_printed_is_refused(write):
    path = write("a.jsonl", jsonl(RECORDS))
    for name in ("\ud800", "a\nb", "\x1b[31m"):
        assert refusal(path, name=name).startswith(f"config.data.train.0.name: {name!r} has characters that cannot")


def test_files_have_no_revision(write):
    assert sources.commit(Source(str(write("a.jsonl", jsonl(RECORDS))))) == ""
    folder = write("set/train.parquet", parquet(RECORDS)).parent
    assert sources.commit(Source(str(folder), format="datasets")) == ""


def test_another_revision_than_the_one_asked_for_is_refused(hub):
    hub.cached.append(NEW)  # as the library does without a connection
    assert f"revision {OLD} of data set 'org/set' cannot be downloaded" in refusal("org/set", revision=OLD)


# Digests


def digest(path: Path | str, **settings: Any) -> str:
    return sources.digest(Source(str(path), **settings))


def test_a_digest_changes_with_a_byte_of_the_content_and_not_with_the_time_or_the_name(write):
    path = write("a.jsonl", jsonl(RECORDS))
    before = digest(path)
    os.utime(path, (1, 1))
    assert digest(path) == before == digest(write("other.jsonl", jsonl(RECORDS)))
    assert digest(write("a.jsonl", jsonl(RECORDS).replace(b"yes", b"yet"))) != before


def test_a_digest_covers_all_that_decides_what_is_read(write):
    one, two = jsonl(RECORDS[:2]), jsonl(RECORDS[2:])
    first = write("d/a.jsonl", one)
    found = [digest(first), digest(first, limit=1), digest(first, format="csv")]
    write("d/b.jsonl", two)
    found.append(digest(first.parent))
    write("d/a.jsonl", two), write("d/b.jsonl", one)
    found.append(digest(first.parent))
    found += [digest(write("a.csv", b"a\tb\n1\t2\n")), digest(write("a.tsv", b"a\tb\n1\t2\n"))]
    found += [digest("builtin:instructions", split=split) for split in ("train", "test")]
    assert len(set(found)) == len(found)


def test_a_file_that_may_not_be_read_is_one_clear_line(write, monkeypatch):
    path = write("a.jsonl", jsonl(RECORDS))

    def refuse(self: epath.Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # The mode of a file means nothing to root, who may run the tests.
    monkeypatch.setattr(type(epath.Path("a")), "open", refuse)
    with pytest.raises(UserError, match=rf"config\.data: {path} cannot be read: Permission denied"):
        digest(path)
    assert refusal(path).startswith(f"{path} cannot be read: ")


# Files that hold one object


def objects(folder: Path) -> Path:
    for name, number in (("task1_a", 3), ("task2_b", 2)):
        instances = [{"id": f"{name}-{i}", "input": f"{i}", "output": ["x"]} for i in range(number)]
        whole = {"Definition": [name], "Instances": instances, "input": "of the file"}
        (folder / f"{name}.json").write_text(json.dumps(whole, indent=4))
    return folder


def test_records_of_an_object_have_its_other_fields_and_the_file_s_name(tmp_path):
    found = list(sources.read(Source(str(objects(tmp_path)), records="Instances")))
    assert [record.fields["id"] for record in found] == [
        "task1_a-0",
        "task1_a-1",
        "task1_a-2",
        "task2_b-0",
        "task2_b-1",
    ]
    assert found[3][:2] == (
        {"task": "task2_b", "Definition": ["task2_b"], "id": "task2_b-0", "input": "0", "output": ["x"]},
        f"{tmp_path}/task2_b.json, Instances 1",
    )


def test_so_many_records_of_each_file_are_read(tmp_path):
    path = str(objects(tmp_path))
    found = sources.read(Source(path, records="Instances", max_per_file=2))
    assert [record.fields["id"] for record in found] == ["task1_a-0", "task1_a-1", "task2_b-0", "task2_b-1"]
    found = sources.read(Source(path, records="Instances", max_per_file=2, limit=3))
    assert [record.fields["id"] for record in found] == ["task1_a-0", "task1_a-1", "task2_b-0"]


def test_a_text_file_says_which_files_of_a_folder_are_read_and_in_what_order(tmp_path):
    objects(tmp_path)
    (tmp_path / "task3.json").write_text("no JSON")
    (tmp_path / "split.txt").write_text("task2_b\ntask1_a\n")
    source = Source(str(tmp_path), records="Instances", file_list=f"{tmp_path}/split.txt", max_per_file=1)
    assert [record.fields["id"] for record in sources.read(source)] == ["task2_b-0", "task1_a-0"]
    (tmp_path / "split.txt").write_text("task2_b\ntask9\n")
    with pytest.raises(
        UserError, match=rf"config.data.file_list: {tmp_path}/split.txt names 'task9', and {tmp_path} has"
    ):
        list(sources.read(source))
    (tmp_path / "split.txt").unlink()
    with pytest.raises(UserError, match=rf"config.data.file_list: {tmp_path}/split.txt cannot be read"):
        list(sources.read(source))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"Instances": 5}', "task.json: no list of records in the field 'Instances'; its fields: Instances"),
        ('{"examples": []}', "task.json: no list of records in the field 'Instances'; its fields: examples"),
        ('{"Instances": ["a"]}', "task.json, Instances 1: expected an object with fields, got str"),
        ("[]", "task.json: expected an object with fields, got list"),
        ('{"Instances"', "task.json: not valid JSON"),
    ],
)
def test_a_file_without_such_records_is_named(tmp_path, content, message):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(UserError) as caught:
        list(sources.read(Source(f"{tmp_path}/task.json", records="Instances")))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_records_are_of_json_files_alone(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match=r"config.data.records is for json files, not for csv files; leave it out"):
        list(sources.read(Source(f"{tmp_path}/a.csv", records="Instances")))


def test_the_digest_depends_on_which_records_are_read(tmp_path):
    path = str(objects(tmp_path))
    digests = {
        sources.digest(Source(path, **given))
        for given in ({}, {"records": "Instances"}, {"records": "Instances", "max_per_file": 1})
    }
    assert len(digests) == 3


def test_every_format_of_the_settings_is_a_kind_of_source():
    formats = get_args(get_type_hints(Source)["format"])
    assert {"auto", *sources.KINDS} == set(formats)
