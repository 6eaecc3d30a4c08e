{{/* What all pods share: who they are, what they may not do, where they may run. */}}

{{- define "mull.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "mull.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "mull.imageFields" -}}
image: {{ include "mull.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* (list root pod-values): where Kubernetes may put it. */}}
{{- define "mull.scheduling" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
serviceAccountName: {{ $pod.serviceAccount | default (include "mull.serviceAccount" $root) }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (list root group pod-values): apart from each other over nodes. */}}
{{- define "mull.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: {{ (index . 2).spread | default "ScheduleAnyway" }}
    labelSelector:
      matchLabels:
        {{- include "mull.selector" (index . 0) | nindent 8 }}
        ray.io/group: {{ index . 1 }}
{{- end }}

{{/* Ray's environment in every pod; the same as `mull serve` sets for a Ray of its own. */}}
{{- define "mull.rayEnv" -}}
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: HOME, value: /tmp}
{{- end }}

{{/* Where mull's processes run: their lines go to the pod's own log, rather than to files that end with it; of Ray's
     own daemons only what is wrong. The head has none of mull's, and talks too much. */}}
{{- define "mull.logEnv" -}}
- {name: RAY_LOG_TO_STDERR, value: "1"}
- {name: RAY_BACKEND_LOG_LEVEL, value: warning}
{{- end }}

{{/* Ray's own health: the liveness of every pod, and the readiness of those without a gateway, which KubeRay would
     otherwise ask for a Serve proxy that is not there. */}}
{{- define "mull.rayHealth" -}}
httpGet: {path: /api/healthz, port: 52365}
timeoutSeconds: 5
{{- end }}

{{- define "mull.rayProbes" -}}
livenessProbe:
  {{- include "mull.rayHealth" . | nindent 2 }}
  initialDelaySeconds: 30
  periodSeconds: 10
  failureThreshold: 12
{{- end }}

{{/* (list root role): checks configuration, checkpoint and Secrets before Ray starts: its one line is the pod's reason. */}}
{{- define "mull.checkContainer" -}}
{{- $root := index . 0 -}}
{{- $isGateway := eq (index . 1) "gateway" -}}
- name: check
  {{- include "mull.imageFields" $root | nindent 2 }}
  command: [mull, check, --config, /etc/mull/config/mull.yaml
    {{- if not $isGateway }}, --only-model{{ end }}
    {{- if include "mull.isDownloaded" $root }}, --wait-s, {{ mul $root.Values.model.waitHours 3600 | quote }}{{ end }}]
  env: [{name: HOME, value: /tmp}]
  resources:
    requests: {cpu: 100m, memory: 512Mi}
    limits: {memory: 1Gi}
  terminationMessagePolicy: FallbackToLogsOnError
  securityContext: {{- include "mull.containerSecurity" $root | nindent 4 }}
  volumeMounts:
    - {name: config, mountPath: /etc/mull/config, readOnly: true}
    {{- include "mull.fileMounts" . | nindent 4 }}
{{- end }}

{{/* (list root role): a gateway sees the checkpoint, certificates and keys; ranks the checkpoint and the Routers' certificate. */}}
{{- define "mull.fileMounts" -}}
{{- $security := (index . 0).Values.security -}}
{{- $isGateway := eq (index . 1) "gateway" -}}
- {name: tmp, mountPath: /tmp}
{{- include "mull.modelMount" (index . 0) }}
{{- if ne $security.tls.mode "none" }}
- {name: link, mountPath: /etc/mull/link, readOnly: true}
{{- if $isGateway }}
- {name: tls, mountPath: /etc/mull/tls, readOnly: true}
{{- end }}
{{- end }}
{{- if and $isGateway $security.tls.clientCaSecretName }}
- {name: client-ca, mountPath: /etc/mull/client-ca, readOnly: true}
{{- end }}
{{- if and $isGateway $security.keys.secretName }}
- {name: keys, mountPath: /etc/mull/keys, readOnly: true}
{{- end }}
{{- end }}

{{- define "mull.fileVolumes" -}}
{{- $root := index . 0 -}}
{{- $security := $root.Values.security -}}
{{- $isGateway := eq (index . 1) "gateway" -}}
- {name: tmp, emptyDir: {}}
- {name: config, configMap: {name: {{ include "mull.fullname" $root }}}}
{{- include "mull.modelVolume" $root }}
{{- if ne $security.tls.mode "none" }}
- {name: link, secret: {secretName: {{ include "mull.linkSecret" $root }}, defaultMode: 0440}}
{{- if $isGateway }}
- {name: tls, secret: {secretName: {{ include "mull.tlsSecret" $root }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- if and $isGateway $security.tls.clientCaSecretName }}
- {name: client-ca, secret: {secretName: {{ $security.tls.clientCaSecretName }}, defaultMode: 0440}}
{{- end }}
{{- if and $isGateway $security.keys.secretName }}
- {name: keys, secret: {secretName: {{ $security.keys.secretName }}, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- define "mull.tlsSecret" -}}
{{- .Values.security.tls.secretName | default (printf "%s-tls" (include "mull.fullname" .)) -}}
{{- end }}

{{- define "mull.linkSecret" -}}
{{- .Values.security.tls.linkSecretName | default (printf "%s-link" (include "mull.fullname" .)) -}}
{{- end }}
