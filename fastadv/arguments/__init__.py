"""Each op's argument list, written down once: what `fastadv.ops`, the C++ launchers and the Triton launchers check."""
