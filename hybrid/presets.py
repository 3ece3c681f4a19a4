"""The four levels of the training guide, and a tiny one, as values of HybridConfig.

The guide has no norm behind the projection (trm_input_norm), and all figures of these are without it.
"""

import inspect

from hybrid.config import HybridConfig


class PresetConfigs:
    """One function a level. docs/points-and-width.md has their parameters, by `trm-hybrid info`."""

    @staticmethod
    def llama_2_7b_level1() -> HybridConfig:
        """Level 1, the guide's own numbers, for LLaMA-2-7B."""
        return HybridConfig(
            trm_input_norm=False,
            injection_layers=[16, 32],
            trm_hidden_size=2048,
            trm_num_heads=16,
            trm_num_layers=2,
            num_recursion_steps=4,
        )

    @staticmethod
    def llama_2_13b_level2() -> HybridConfig:
        """Level 2, the guide's own numbers, for LLaMA-2-13B."""
        return HybridConfig(
            trm_input_norm=False,
            injection_layers=[8, 16, 24, 32, 40],
            trm_hidden_size=4096,
            trm_num_heads=32,
            trm_num_layers=3,
            num_recursion_steps=6,
        )

    @staticmethod
    def llama_2_70b_enterprise() -> HybridConfig:
        """Level 3, for LLaMA-2-70B: sized so that the guide's 15-20 B added parameters are true."""
        return HybridConfig(
            trm_input_norm=False,
            injection_layers=list(range(8, 73, 8)),
            trm_hidden_size=8192,
            trm_num_heads=64,
            trm_num_layers=2,
            num_recursion_steps=8,
        )

    @staticmethod
    def research_experimental() -> HybridConfig:
        """Level 4, for a 70B base of 80 layers: sized so that the guide's 50 B+ added parameters are true."""
        return HybridConfig(
            trm_input_norm=False,
            injection_layers=list(range(4, 81, 4)),
            trm_hidden_size=10240,
            trm_num_heads=80,
            trm_num_layers=2,
            num_recursion_steps=8,
        )

    @staticmethod
    def tiny() -> HybridConfig:
        """For tests, demonstrations and a first try: about 57 k parameters beside a base of width 64."""
        return HybridConfig(
            trm_input_norm=False,
            injection_layers=[1],
            trm_hidden_size=64,
            trm_num_heads=4,
            trm_num_layers=1,
            trm_intermediate_size=168,
            num_recursion_steps=8,
            recursion_sampling="uniform",
        )


PRESETS = dict(inspect.getmembers(PresetConfigs, inspect.isfunction))
