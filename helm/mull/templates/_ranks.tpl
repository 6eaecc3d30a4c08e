{{/* Pods with ranks, and with the Routers that lead them. */}}
{{- define "mull.rankGroup" -}}
{{- $layout := include "mull.layout" . | fromYaml -}}
{{- $isCuda := eq .Values.layout.device "cuda" -}}
groupName: ranks
replicas: {{ $layout.pods }}
minReplicas: {{ $layout.pods }}
maxReplicas: {{ $layout.maxPods }}
# A core of Ray's for each rank, and one for a Router.
resources: {CPU: {{ add1 $layout.ranksPerPod | quote }}{{ if $isCuda }}, GPU: {{ $layout.ranksPerPod | quote }}{{ end }}}
rayStartParams:
  object-store-memory: "200000000"
template:
  metadata:
    labels: {{- include "mull.labels" . | nindent 6 }}
    {{- with .Values.ranks.pod.annotations }}
    annotations: {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "mull.podSecurity" . | nindent 4 }}
    {{- include "mull.scheduling" (list . .Values.ranks.pod) | nindent 4 }}
    {{- include "mull.spread" (list . "ranks" .Values.ranks.pod) | nindent 4 }}
    initContainers:
      {{- include "mull.checkContainer" (list . "ranks") | nindent 6 }}
    containers:
      - name: ranks
        {{- include "mull.imageFields" . | nindent 8 }}
        env:
          {{- include "mull.rayEnv" . | nindent 10 }}
          {{- include "mull.logEnv" . | nindent 10 }}
          {{- range $name, $value := .Values.ranks.env }}
          - {name: {{ $name }}, value: {{ $value | quote }}}
          {{- end }}
        ports:
          - {name: mull-metrics, containerPort: {{ .Values.ranks.ports.metrics }}}
          - {name: metrics, containerPort: 8080}
        resources: {{- include "mull.rankResources" . | nindent 10 }}
        securityContext: {{- include "mull.rankSecurity" . | nindent 10 }}
        {{- include "mull.rayProbes" . | nindent 8 }}
        readinessProbe:
          {{- include "mull.rayHealth" . | nindent 10 }}
          periodSeconds: 5
        volumeMounts:
          {{- include "mull.fileMounts" (list . "ranks") | nindent 10 }}
          - {name: shm, mountPath: /dev/shm}
    volumes:
      {{- include "mull.fileVolumes" (list . "ranks") | nindent 6 }}
      - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .Values.layout.shmGiB }}Gi}}
{{- end }}

{{/* RDMA registers memory, which must then not be swapped. */}}
{{- define "mull.rankSecurity" -}}
{{- $rdma := false -}}
{{- range $name, $_ := .Values.ranks.extraResources }}{{ if hasPrefix "rdma/" $name }}{{ $rdma = true }}{{ end }}{{ end -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]{{ if $rdma }}, add: [IPC_LOCK]{{ end }}}
{{- end }}
