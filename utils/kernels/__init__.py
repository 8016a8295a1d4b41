"""Operations of LLaMA-shaped models on a CPU, in C++ that is compiled on the machine it runs on."""
