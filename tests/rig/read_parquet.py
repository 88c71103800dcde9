"""Prints what is in Parquet files as JSON. Every value is told by its column's type alone, as text; NULL is null."""

import json
import struct
import sys

import pyarrow
import pyarrow.parquet


def texts(column):
    kind = column.type
    if pyarrow.types.is_timestamp(kind):
        column = column.cast(pyarrow.int64())
    elif pyarrow.types.is_date32(kind):
        column = column.cast(pyarrow.int32())
    values = column.to_pylist()
    if pyarrow.types.is_floating(kind):
        form = ">f" if kind.bit_width == 32 else ">d"
        return [None if v is None else struct.pack(form, v).hex() for v in values]
    if pyarrow.types.is_decimal(kind):
        return [None if v is None else format(v, "f") for v in values]
    if pyarrow.types.is_boolean(kind):
        return [None if v is None else str(v).lower() for v in values]
    return [None if v is None else str(v) for v in values]


def main(files):
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(f, partitioning=None) for f in files)
    names = table.column_names
    types = {name: str(table.schema.field(name).type) for name in names}
    rows = zip(*(texts(table.column(name)) for name in names))
    json.dump({"types": types, "rows": [dict(zip(names, row)) for row in rows]}, sys.stdout)


main(sys.argv[1:])
