"""The paper's comparisons on the public API of `cola`; today the offline default: `pretrain` and `demo`."""
