"""What lets SGLang serve DFLASH on a CPU."""
