"""Single ops, a file each: meaning, kernels, launchers, gradient, public function."""
