"""The plan: what each rank computes, sends and keeps, decided once from shapes and layouts."""
