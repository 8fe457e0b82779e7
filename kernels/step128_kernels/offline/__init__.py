"""What our kernels cost on RDNA4 and RDNA3.5, found by compiling them and counting; no GPU takes part."""
