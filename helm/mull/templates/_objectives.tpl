{{/* rules/objectives.yaml, with the values' numbers. */}}
{{- define "mull.objectives" -}}
{{- $promise := .Values.monitoring.objectives -}}
groups:
  - name: mull-objectives
    rules:
      - record: mull:objective_failed:ratio
        expr: vector({{ $promise.failed }})
      - record: mull:objective_first_token_late:ratio
        expr: vector({{ $promise.firstTokenLate }})
      - record: mull:first_tokens:total
        expr: sum without () (mull_time_to_first_token_seconds_count)
      - record: mull:first_tokens_late:total
        expr: mull_time_to_first_token_seconds_count - sum without (le) (mull_time_to_first_token_seconds_bucket{le="{{ printf "%.1f" (float64 $promise.firstTokenSeconds) }}"})
      - record: mull:objective_first_answer_late:ratio
        expr: vector({{ $promise.firstAnswerLate }})
      - record: mull:first_answers:total
        expr: sum without () (mull_time_to_first_answer_seconds_count)
      - record: mull:first_answers_late:total
        expr: mull_time_to_first_answer_seconds_count - sum without (le) (mull_time_to_first_answer_seconds_bucket{le="{{ printf "%.1f" (float64 $promise.firstAnswerSeconds) }}"})
{{- end }}
