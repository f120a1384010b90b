"""How many pages the KV memory has: as told, else as many as could be used and fit beside all else.

Called by the engine once, after the weights are loaded and before pages are made and CUDA graphs captured.
"""

from __future__ import annotations

import torch

from actors.config import EngineConfig
from actors.decoder import Decoder
from kernels.cpu_linear import available_memory_bytes

CPU_KV_SHARE = 0.25
"""Share of the free memory that KV pages take on a CPU unless told otherwise, and at most 4 GiB."""


def choose_num_pages(config: EngineConfig, decoder: Decoder, draft_bytes_per_token: int, reserved_bytes: int) -> int:
    """Pages for the target's keys and values, and as many for the draft model's.

    draft_bytes_per_token: of the draft model's pages; 0 without one. reserved_bytes: of a GPU's memory, for what comes
    after the pages. ValueError when not even two pages fit.
    """
    if config.num_pages is not None:
        return config.num_pages
    page_bytes = (decoder.kv_bytes_per_token + draft_bytes_per_token) * config.page_size
    pages_per_row = -(-decoder.max_model_len // config.page_size)
    if config.kv_cache_bytes is not None:
        room = config.kv_cache_bytes
    elif decoder.device.type == "cuda":
        room = _room_on_gpu(decoder.device, config.gpu_memory_utilization) - reserved_bytes
    else:
        room = min(int(available_memory_bytes() * CPU_KV_SHARE), 4 << 30)
    num_pages = min(room // page_bytes, pages_per_row * config.max_num_seqs)
    if num_pages < 2:
        raise ValueError(
            f"{room} bytes for keys and values hold {num_pages} pages of {page_bytes} bytes, at least 2 are "
            "needed; raise engine.kv_cache_bytes or lower engine.page_size"
        )
    return num_pages


def _room_on_gpu(device: torch.device, utilization: float) -> int:
    # What loading has left in torch's hands is free, too.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - utilization) * total)
