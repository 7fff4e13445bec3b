"""What aggregate_runs.py writes, and the exports themselves, read by other engines; object storage at both ends.

The file formats are the interface: DuckDB, pyarrow, pandas and Dask must find the rows and numbers that Polars finds.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from conftest import clean_env, run_script
from polars.testing import assert_frame_equal
from test_aggregate_runs import run, write_export

ARCHS = ("filter_bank", "gnn_qk", "self_attention")


def write_lab(folder: Path) -> None:
    """Three projects whose columns and types differ, 40 runs each; one run in ten has no test MSE."""
    for number, project in enumerate(("alpha", "beta", "gamma")):
        runs = [
            run(
                f"stage{i % 3}_{ARCHS[(i + number) % 3]}_sbm_k8_s{i}",
                {"model": {"k": [8, 0.5, "auto"][number]}, f"only_{project}": True},
                {} if i % 10 == 0 else {"test/mse": 1 / (3 + i + number), f"loss_{project}": i},
                tags=["paper"] if i % 2 else [],
            )
            for i in range(40)
        ]
        write_export(folder, project, runs)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `exports/`, the aggregate of it as `all.parquet`, and by project as `by_project/`."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder / "exports")
    for options in (["-o", "all.parquet"], ["-o", "by_project", "--partition-by", "project"]):
        done = run_script("aggregate_runs.py", "exports", *options, cwd=folder, env=clean_env(folder))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def by_arch(lab: Path) -> dict[str, float]:
    """Mean test MSE by arch, by Polars."""
    frame = pl.scan_parquet(lab / "all.parquet").group_by("arch").agg(pl.col("metric_test_mse").mean())
    return dict(frame.collect().rows())


def close(got: dict[str, float], want: dict[str, float]) -> bool:
    """Equal keys, and values that differ by no more than the order of additions can make them."""
    return set(got) == set(want) and all(math.isclose(got[key], want[key], rel_tol=1e-14) for key in want)


def test_duckdb_reads_the_partitions(lab, by_arch):
    source = f"read_parquet('{lab}/by_project/*/*.parquet', hive_partitioning = true)"
    assert close(dict(duckdb.sql(f"SELECT arch, avg(metric_test_mse) FROM {source} GROUP BY arch").fetchall()), by_arch)
    rows = duckdb.sql(
        f"SELECT project, count(*), count(config_model_k) FROM {source} GROUP BY ALL ORDER BY 1"
    ).fetchall()
    assert rows == [("alpha", 40, 40), ("beta", 40, 40), ("gamma", 40, 40)]
    tagged = duckdb.sql(f"SELECT count(*) FROM {source} WHERE list_contains(tags, 'paper')").fetchall()
    assert tagged == [(60,)]


def test_duckdb_reads_the_exports_by_name(lab):
    source = f"read_parquet('{lab}/exports/*_runs.parquet', union_by_name = true)"
    rows = duckdb.sql(
        f"SELECT project, avg(metric_test_mse), any_value(config_model_k) FROM {source} GROUP BY 1"
    ).fetchall()
    frame = pl.read_parquet(lab / "all.parquet")
    want = dict(frame.group_by("project").agg(pl.col("metric_test_mse").mean()).rows())
    assert close({project: mean for project, mean, _ in rows}, want)
    # Without one type for every file, each engine finds its own: here is why one aggregates first.
    assert {project: k for project, _, k in rows} == {"alpha": "8", "beta": "0.5", "gamma": "auto"}
    assert set(duckdb.sql(f"FROM {source}").columns) == set(frame.columns[: frame.columns.index("protocol")])


def test_pyarrow_reads_both(lab, by_arch):
    table = ds.dataset(lab / "by_project", partitioning="hive").to_table(columns=["arch", "project", "metric_test_mse"])
    means = table.group_by("arch").aggregate([("metric_test_mse", "mean")]).to_pydict()
    assert close(dict(zip(means["arch"], means["metric_test_mse_mean"], strict=True)), by_arch)
    assert pc.value_counts(table["project"]).to_pylist()[0]["counts"] == 40

    files = sorted((lab / "exports").glob("*_runs.parquet"))
    columns = ["id", "project", "metric_test_mse", "metric_loss_beta", "tags", "created_at"]
    schema = pa.unify_schemas([pq.read_schema(file) for file in files[:2]], promote_options="permissive")
    narrow = pa.schema([schema.field(column) for column in columns])
    raw = ds.dataset(files, schema=narrow).to_table()
    assert_frame_equal(pl.from_arrow(raw), pl.read_parquet(lab / "all.parquet", columns=columns).select(columns))


def test_pandas_reads_both(lab, by_arch):
    frame = pd.read_parquet(lab / "by_project")
    assert close(frame.groupby("arch")["metric_test_mse"].mean().to_dict(), by_arch)
    whole = pl.read_parquet(lab / "all.parquet")
    assert sorted(frame.columns) == sorted(whole.columns)
    raw = pd.concat([pd.read_parquet(file) for file in sorted((lab / "exports").glob("*_runs.parquet"))])
    assert raw["metric_test_mse"].dtype == "float64"
    assert list(raw["id"]) == whole["id"].to_list()
    assert raw["metric_test_mse"].sum() == pytest.approx(whole["metric_test_mse"].sum(), rel=1e-14)


def test_dask_reads_both_with_two_worker_processes(lab, by_arch):
    import dask.dataframe as dd
    from dask.distributed import Client, LocalCluster

    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with LocalCluster(**settings, host="127.0.0.1") as cluster, Client(cluster) as client:
        assert len(set(client.run(os.getpid).values()) - {os.getpid()}) == 2
        partitions = dd.read_parquet(lab / "by_project", columns=["arch", "metric_test_mse"])
        assert partitions.npartitions >= 2
        assert close(partitions.groupby("arch")["metric_test_mse"].mean().compute().to_dict(), by_arch)
        files = sorted(map(str, (lab / "exports").glob("*_runs.parquet")))
        raw = dd.from_map(pd.read_parquet, files, columns=["project", "metric_test_mse"])
        want = pl.read_parquet(lab / "all.parquet").group_by("project").agg(pl.col("metric_test_mse").mean())
        assert close(raw.groupby("project")["metric_test_mse"].mean().compute().to_dict(), dict(want.rows()))


# ---- Object storage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """A local S3 server, as the environment variables that point to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    server.stop()


class Bucket:
    """A fresh bucket that holds the lab's exports, and the script run so that `s3://lab` means it."""

    def __init__(self, s3: dict[str, str], exports: Path, folder: Path) -> None:
        import boto3

        self.env, self.folder = clean_env(folder, **s3), folder
        self.client = boto3.client(
            "s3",
            endpoint_url=s3["AWS_ENDPOINT_URL"],
            region_name=s3["AWS_REGION"],
            aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
        )
        self.name = f"lab-{os.getpid()}-{abs(hash(folder)) % 10**8}"
        self.client.create_bucket(Bucket=self.name)
        for file in exports.iterdir():
            self.client.upload_file(str(file), self.name, f"exports/{file.name}")

    def keys(self, prefix: str) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)["Contents"]]

    def aggregate(self, *args: str) -> subprocess.CompletedProcess[str]:
        args = tuple(arg.replace("s3://lab", f"s3://{self.name}") for arg in args)
        return run_script("aggregate_runs.py", *args, cwd=self.folder, env=self.env)


@pytest.fixture
def bucket(s3: dict[str, str], lab: Path, tmp_path: Path) -> Bucket:
    return Bucket(s3, lab / "exports", tmp_path)


def test_object_storage_in_and_out(bucket, lab, tmp_path):
    want = pl.read_parquet(lab / "all.parquet").drop("_source_file")
    for given in ("s3://lab/exports", "s3://lab/exports/*.parquet", "s3://lab/**/team_*_runs.parquet"):
        done = bucket.aggregate(given, "-o", "s3://lab/out/all.parquet")
        assert done.returncode == 0, done.stderr
        bucket.client.download_file(bucket.name, "out/all.parquet", str(tmp_path / "got.parquet"))
        got = pl.read_parquet(tmp_path / "got.parquet")
        assert_frame_equal(got.drop("_source_file"), want)
    assert got["_source_file"][0] == f"s3://{bucket.name}/exports/team_alpha_runs.parquet"


def test_a_bucket_and_a_folder_together_count_a_run_once_by_the_metadata_of_each(bucket, tmp_path):
    write_export(tmp_path / "new", "alpha", [run("newer_k9", id="alpha-0")], exported_at="2025-12-01T00:00:00Z")
    inputs = ("s3://lab/exports/team_alpha_runs.parquet", "new")
    done = bucket.aggregate(*inputs, "-o", "out.csv", "--columns", "id,k,_source_file")
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row[1:] for row in pl.read_csv(tmp_path / "out.csv").rows()}
    assert len(rows) == 40
    assert rows["alpha-0"] == (9, "new/team_alpha_runs.parquet")


def test_partitions_in_a_bucket(bucket):
    command = ("s3://lab/exports/", "-o", "s3://lab/by_project", "--partition-by", "project")
    done = bucket.aggregate(*command)
    assert done.returncode == 0, done.stderr
    folders = [key.split("/")[1] for key in bucket.keys("by_project/")]
    assert folders == ["project=alpha", "project=beta", "project=gamma"]
    again = bucket.aggregate(*command)
    assert again.returncode == 2
    assert "Give a new folder" in again.stderr


def test_what_is_wrong_in_a_bucket_is_named(bucket):
    bucket.client.put_object(Bucket=bucket.name, Key="exports/text_runs.parquet", Body=b"hello")
    done = bucket.aggregate("s3://lab/exports/", "s3://lab/nothing/", "-o", "out.parquet")
    assert done.returncode == 1
    assert "exports/text_runs.parquet: no readable Parquet file" in done.stderr
    assert "/nothing/: no such file" in done.stderr
    wrong = bucket.aggregate("s3://no-such-bucket-here/exports/", "-o", "out2.parquet")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "no-such-bucket-here" in wrong.stderr
