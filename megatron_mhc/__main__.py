"""``python -m megatron_mhc`` is ``megatron-mhc``."""

from megatron_mhc.cli import main

if __name__ == '__main__':
    main()
