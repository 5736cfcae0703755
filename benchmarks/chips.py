"""TPU chips that are described to the compiler, and not there. To be imported before JAX is.

It needs `libtpu`, on Linux and x86. No array can be made on such a chip: shapes go in, and what the compiler tells
comes out.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # No chip is opened, so that several processes may do this at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

from jax.experimental import topologies


def described_chips(rows, columns):
    """Return the chips of a grid of TPU v5e, at least 2 x 2 and at most 16 x 16."""
    return topologies.get_topology_desc(topology_name=f"v5e:{rows}x{columns}", platform="tpu").devices
