"""How faithful methods are to full attention on real long texts, teacher-forced: no question, no answer, no score."""
