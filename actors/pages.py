"""The pool of KV pages: which are free. Knows page numbers only, no tokens and no tensors."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1, each to one owner at a time.

    Pages are found next-fit, in ascending order: what is allocated together lies together, and attention on a CPU
    reads runs of pages in place (`kernels.cpu_attention`).
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.num_free = num_pages
        self._is_free = bytearray(b"\x01" * num_pages)
        self._cursor = 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        pages = []
        for _ in range(count):
            page = self._is_free.find(1, self._cursor)
            if page < 0:
                page = self._is_free.find(1)
            self._is_free[page] = 0
            self._cursor = page + 1
            pages.append(page)
        self.num_free -= count
        return pages

    def free(self, page: int) -> None:
        """Give one page back."""
        assert not self._is_free[page], f"page {page} is freed twice"
        self._is_free[page] = 1
        self.num_free += 1
