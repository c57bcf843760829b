"""The only room that imports Megatron-Core."""

from opd_megatron.mcore.cpu.platform import quiet_upstream

quiet_upstream()
