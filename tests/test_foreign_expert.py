"""Any expert, any frames: a cache of a radar's echoes over a harbour; no network, no nuScenes.

Read it as an example: say where the values come from, what a frame has, and how to compute it.
"""

import numpy as np

from cache_tools.build import build_cache
from cache_tools.expectation import Expectation
from cache_tools.manifest import Identity
from cache_tools.reader import CacheReader
from cache_tools.source import CachedExpert
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid

# Frames are named by any strings, here files of two cameras and a time in words.
KEYS = ["pier/cam 1/0001.jpg", "pier/cam 1/0002.jpg", "Möwe.png", "noon, third day"]

GRID = BEVGrid(x_min=-8, x_max=8, y_min=0, y_max=6, nx=32, ny=12, frame="ego")
SIGNALS = {
    "echo": SignalSpec(name="echo", shape=(2, *GRID.shape), dtype="float16", grid=GRID),
    "ships": SignalSpec(name="ships", shape=(5, 3), dtype="float32", ragged=True),
    "weather": SignalSpec(name="weather", shape=(4,), dtype="float32"),
}


def ships_of(key: str) -> np.ndarray:
    """(M, 3) x, y in metres and a size: as many ships as the key has capitals and digits."""
    count = min(sum(letter.isupper() or letter.isdigit() for letter in key), 5)
    return np.array([[3 * n - 6, n + 0.5, 0.5 + n] for n in range(count)], float).reshape(-1, 3)


def expert(positions):
    """What the expert says of a batch: for each signal one array per frame, none of torch."""
    rows, columns = np.indices(GRID.shape)
    x, y, _ = GRID.cell_to_metres() @ np.stack([columns.ravel(), rows.ravel(), rows.ravel() ** 0])
    found = {name: [] for name in SIGNALS}
    for key in (KEYS[position] for position in positions):
        ships = ships_of(key)
        away = [np.hypot(x - ship[0], y - ship[1]) / ship[2] for ship in ships]
        near = np.exp(-np.min(away, axis=0)) if away else np.zeros(x.shape)
        found["echo"].append(np.stack([near, near * x]).reshape(2, *GRID.shape))
        found["ships"].append(ships)
        found["weather"].append(np.full(4, len(key) / 7))
    return found


def test_a_cache_of_an_expert_that_is_no_network(tmp_path):
    report = build_cache(
        out=tmp_path / "harbour.zarr",
        identity=Identity(
            expert="harbour-radar",
            tensors="firmware 3.1",
            preprocessing={"window": "hann", "gain": 0.5},
            mode="clean",
            dataset_version="harbour 2",
            split="summer",
        ),
        signals=SIGNALS,
        keys=KEYS,
        compute=expert,
        shard_frames=3,
        quiet=True,
    )
    assert report.complete and report.built == 4

    reader = CacheReader(tmp_path / "harbour.zarr", expect=Expectation(split="summer", grid=GRID))
    assert reader.tokens == tuple(KEYS)
    counts = []
    for position, key in enumerate(KEYS):
        said = {name: values[0] for name, values in expert([position]).items()}
        frame = reader.read(key)
        # Stored as the spec says: maps in float16, tables and vectors in float32.
        np.testing.assert_array_equal(frame["echo"], said["echo"].astype(np.float16))
        np.testing.assert_array_equal(frame["ships"], said["ships"].astype(np.float32))
        np.testing.assert_array_equal(frame["weather"], said["weather"].astype(np.float32))
        counts.append(len(frame["ships"]))
    assert counts == [5, 5, 1, 0]


def test_object_queries_of_any_number_are_a_table(tmp_path):
    """As a DETR3D's would be: of each query a state, a reference point and the class scores."""
    state, classes = 256, 10
    spec = SignalSpec(
        name="queries", shape=(300, state + 3 + classes), dtype="float16", ragged=True
    )

    def queries(position):
        rng = np.random.default_rng(position)
        return rng.normal(size=(300 - 150 * position, spec.shape[1])).astype(np.float32)

    build_cache(
        out=tmp_path / "queries.zarr",
        identity=Identity(
            expert="queries-from-elsewhere",
            tensors="of epoch 24",
            preprocessing={},
            mode="clean",
            dataset_version="any",
            split="train",
        ),
        signals={"queries": spec},
        keys=["a", "b", "c"],
        compute=lambda positions: {"queries": [queries(position) for position in positions]},
        preset="balanced",
        quiet=True,
    )
    source = CachedExpert(tmp_path / "queries.zarr", names=("queries",))
    found = source.signals([source.load(key) for key in "abc"])["queries"]
    assert [len(table) for table in found] == [300, 150, 0]
    for position, table in enumerate(found):
        np.testing.assert_array_equal(table.numpy(), queries(position).astype(np.float16))
