"""Flags of benchmarks that are refused before an engine starts."""

import pytest

from loraplex.entrypoints.cli import main as cli

import punica
import slora
import tiers

TINY = ["--model", "tiny", "--device", "cpu", "--num-pages", "400", "--max-num-seqs", "8"]


def status_of(kind: str, arguments: list[str]) -> int:
    """Exit status of one benchmark, run in this process."""
    scripts = {"slora": slora.main, "punica": punica.main, "tiers": tiers.main}
    try:
        if kind in scripts:
            return scripts[kind](arguments)
        return cli.main(["bench", kind, *arguments])
    except SystemExit as error:  # argparse
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("throughput", ["--lengths", "9,9"], "LOW,HIGH"),
        ("throughput", ["--num-requests", "1.5"], "'1.5' is not a whole number above 0"),
        ("throughput", ["--num-adapters", "1,-1"], "'-1' is not a whole number, 0 or more"),
        ("latency", ["--popularity", "odd"], "'odd' is none of"),
        ("latency", [*TINY, "--batches", "9"], "9 requests exceed --max-num-seqs, which is 8"),
        ("serve", ["--rates", "0"], "'0' is not a number above 0"),
        ("cluster", ["--placement", "odd"], "'odd' is none of"),
        ("cluster", ["--endpoint", "ipc:///nowhere", "--kill"], "that the benchmark starts"),
        ("throughput", ["--out", "/nowhere/x.jsonl"], "/nowhere"),
        ("throughput", ["--out", "x.svg"], "JSON lines"),
        ("serve", ["--plot", "x.jpg"], "ends in .svg or .png"),
        ("slora", ["--setting", "S3"], "'S3' is none of"),
        ("slora", ["--rates", "nan"], "--rates"),
        ("punica", ["--max-num-seqs", "8"], "--batches"),
        ("tiers", ["--adapter", "a=/nowhere"], "name none"),
        ("tiers", ["--max-adapter-slots", "8"], "--max-adapter-slots is set by"),
        ("tiers", [*TINY, "--batch", "8"], "--max-num-seqs must exceed"),
        ("throughput", ["--model", "/nowhere", "--num-adapters", "1"], "config.json"),
    ],
)
def test_bad_flags(
    kind: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(kind, arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
