//! Front door, tokenising, prefix index, placement, admission.
