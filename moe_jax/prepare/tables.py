"""The documents in a parquet file or a data set of the hub, read in constant memory. Imports no jax."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.prepare.options import Part, ReadOptions, column_index

_BATCH = 1 << 23
"""Bytes of a parquet file that are decoded at a time, about."""


def read_parquet(file: Path, options: ReadOptions) -> Iterator[Part]:
    """The column ``text_key`` of strings; nulls are passed over."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow; run pip install 'pyarrow>=20'") from None
    if file.suffix.lower() != ".parquet":
        raise UserError(f"{file} is a parquet file within another format; decompress it")
    key = options.text_key
    try:
        # Page by page, as row groups may be larger than memory; a page is the least that Arrow reads.
        with (
            pyarrow.OSFile(os.fsencode(file)) as opened,  # and not by its name, which need not be UTF-8
            pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20) as table,
        ):
            schema, metadata = table.schema_arrow, table.metadata
            _check_text(str(file), key, schema.field(column_index(schema.names, key, str(file))).type)
            column = [metadata.schema.column(index).path for index in range(metadata.num_columns)].index(key)
            number = 0
            for group in range(metadata.num_row_groups):
                size = metadata.row_group(group).column(column).total_uncompressed_size
                per_row = max(1, size // max(1, metadata.row_group(group).num_rows))
                for batch in table.iter_batches(max(1, min(64, _BATCH // per_row)), [group], [key]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        if value is None:
                            options.leave_out_null(f"{file}, row {number}")
                        else:
                            yield value, True
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises OSError without a number for damaged pages; with one it is the machine's fault.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is not a whole parquet file ({error}); copy or download it again") from None


def read_hub(name: str, options: ReadOptions) -> Iterator[Part]:
    """Column ``text_key`` of a data set NAME, NAME@CONFIG or either with :SPLIT, from the Hugging Face hub."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{name} needs the package datasets; run pip install 'datasets>=4'") from None
    key = options.text_key
    path, _, split = name.partition(":")
    path, _, subset = path.partition("@")
    datasets.disable_progress_bars()
    try:
        data: Any = datasets.load_dataset(path, subset or None, split=split or "train")
    except Exception as error:  # noqa: BLE001 - the library lets through whatever its readers and the network raise
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(
            f"the data set hf:{name} cannot be loaded ({reason}); check "
            "its name, its split and the network, or download its parquet files and name them"
        ) from None
    column_index(data.column_names, key, f"hf:{name}")
    number = 0
    # Arrow's tables are mapped from disk, so that only one text at a time is in memory.
    for batch in data.select_columns([key]).with_format("arrow").iter(batch_size=1024):
        _check_text(f"hf:{name}", key, batch.schema.field(key).type)
        for value in batch[key]:
            number += 1
            if value.is_valid:
                yield value.as_py(), True
            else:
                options.leave_out_null(f"hf:{name}, row {number}")


def _check_text(where: str, key: str, kind: Any) -> None:
    """UserError where a column of Arrow's type ``kind`` does not hold strings."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(value) for check in is_text):
        raise UserError(f"{where}: the column {key} must hold text, got {kind}; set --text-key")
