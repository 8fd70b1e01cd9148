"""`python -m mha2mla_vlm`, and so `accelerate launch -m mha2mla_vlm`, is the command `mha2mla`."""

from mha2mla_vlm.cli.main import main

if __name__ == "__main__":
    main()
