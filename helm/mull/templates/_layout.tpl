{{/*
mull.layout: what follows from .Values.layout, as YAML: world, ranksPerPod, podsPerCopy, pods and maxPods.
A contradiction ends the rendering with a sentence.
*/}}
{{- define "mull.layout" -}}
{{- $layout := .Values.layout -}}
{{- $tp := int $layout.tp -}}
{{- $dp := int $layout.dp -}}
{{- $perNode := int $layout.ranksPerNode -}}
{{- $world := mul $tp $dp | int -}}
{{- $ranksPerPod := min $world $perNode | int -}}
{{- $copies := int $layout.copies -}}
{{- $maxCopies := $layout.maxCopies | default $copies | int -}}
{{- $copiesName := kindIs "invalid" $layout.maxCopies | ternary "copies" "maxCopies" -}}
{{- $total := mul $world $maxCopies | int -}}
{{- if lt $maxCopies $copies -}}
{{- fail (printf "layout.maxCopies %d is below layout.copies %d; raise it, or leave it out for a fixed number" $maxCopies $copies) -}}
{{- end -}}
{{- if mod $world (int $layout.expertTp) -}}
{{- fail (printf "layout.expertTp %d does not divide tp %d * dp %d = %d ranks" (int $layout.expertTp) $tp $dp $world) -}}
{{- end -}}
{{- if mod $world $ranksPerPod -}}
{{- fail (printf "layout: a copy has tp %d * dp %d = %d ranks, which do not fill nodes of %d; set layout.ranksPerNode to a divisor of %d" $tp $dp $world $perNode $world) -}}
{{- end -}}
{{- if and (gt $dp 1) (mod $ranksPerPod $tp) -}}
{{- fail (printf "layout: the %d ranks of an attention group (tp) share a node, and %d ranks of a pod are no multiple of %d; lower layout.tp or raise layout.ranksPerNode" $tp $ranksPerPod $tp) -}}
{{- end -}}
{{- if not (kindIs "invalid" $layout.gpus) -}}
{{- if eq $layout.device "cpu" -}}
{{- fail (printf "layout.gpus is %d and layout.device is cpu; take one of them away" (int $layout.gpus)) -}}
{{- end -}}
{{- if ne (int $layout.gpus) $total -}}
{{- fail (printf "layout.gpus is %d, but %s %d * tp %d * dp %d needs %d; change one of them" (int $layout.gpus) $copiesName $maxCopies $tp $dp $total) -}}
{{- end -}}
{{- end -}}
world: {{ $world }}
ranksPerPod: {{ $ranksPerPod }}
podsPerCopy: {{ div $world $ranksPerPod }}
pods: {{ div (mul $world $copies) $ranksPerPod }}
maxPods: {{ div $total $ranksPerPod }}
{{- end }}

{{/* A rank's share of the pod, and a core and 2 GiB for the Router and Ray's own processes. */}}
{{- define "mull.rankResources" -}}
{{- $layout := .Values.layout -}}
{{- $ranks := (include "mull.layout" . | fromYaml).ranksPerPod | int -}}
requests:
  cpu: {{ add (mul $ranks (int $layout.cpusPerRank)) 1 | quote }}
  memory: {{ include "mull.rankMemory" . }}
  {{- with include "mull.rankDevices" . | trim }}{{ . | nindent 2 }}{{ end }}
limits:
  memory: {{ include "mull.rankMemory" . }}
  {{- with include "mull.rankDevices" . | trim }}{{ . | nindent 2 }}{{ end }}
{{- end }}

{{- define "mull.rankMemory" -}}
{{- $ranks := (include "mull.layout" . | fromYaml).ranksPerPod | int -}}
{{- printf "%dGi" (add (mul $ranks (int .Values.layout.memoryGiBPerRank)) (int .Values.layout.shmGiB) 2 | int) -}}
{{- end }}

{{- define "mull.rankDevices" -}}
{{- if eq .Values.layout.device "cuda" }}
{{ .Values.ranks.gpuResource }}: {{ (include "mull.layout" . | fromYaml).ranksPerPod | int | quote }}
{{- end }}
{{- range $name, $count := .Values.ranks.extraResources }}
{{ $name }}: {{ $count | quote }}
{{- end }}
{{- end }}
