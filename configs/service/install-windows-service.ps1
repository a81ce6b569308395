# Windows service of opcua-detector, in an administrator's PowerShell:
#
#   .\install-windows-service.ps1 -Config C:\ProgramData\opcua-detector\plant.yaml -Account "NT SERVICE\opcua-detector"
#   .\install-windows-service.ps1 -Config ... -WithoutNssm     # a task of the Task Scheduler: nothing to install
#
# A Python program does not speak the protocol of the service manager, so `sc.exe create` alone does not work: the
# manager would wait for an answer and end it (error 1053). NSSM (nssm.cc) speaks it, restarts the program when it
# ends, and stops it with Ctrl-C, on which the detector writes its last words into the nodes.
#
# There is no watchdog like systemd's: with `metrics:` in the configuration a second task asks /health once a minute
# and restarts what does not answer.

param(
    [Parameter(Mandatory = $true)] [string] $Config,
    [string] $Python = "C:\opcua-detector\.venv\Scripts\python.exe",
    [string] $Name = "opcua-detector",
    [string] $Account = "NT SERVICE\opcua-detector",
    [string] $Nssm = "nssm.exe",
    [string] $Health = "http://127.0.0.1:9464/health",
    [switch] $WithoutNssm,
    [switch] $WithWatchdog
)
$ErrorActionPreference = "Stop"
$folder = Split-Path -Parent (Resolve-Path $Config)
$arguments = "-m opcua_detector run `"$Config`""

if ($WithoutNssm) {
    $action = New-ScheduledTaskAction -Execute $Python -Argument $arguments -WorkingDirectory $folder
    $trigger = New-ScheduledTaskTrigger -AtStartup
    # LOCAL SERVICE has few rights and no password. Restarted each minute, no limit of time, not on battery rules.
    $user = New-ScheduledTaskPrincipal -UserId "NT AUTHORITY\LOCAL SERVICE" -LogonType ServiceAccount
    $settings = New-ScheduledTaskSettingsSet -RestartCount 999 -RestartInterval (New-TimeSpan -Minutes 1) `
        -ExecutionTimeLimit (New-TimeSpan -Seconds 0) -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
    Register-ScheduledTask -TaskName $Name -Action $action -Trigger $trigger -Principal $user -Settings $settings
    icacls $folder /grant "LOCAL SERVICE:(OI)(CI)M" | Out-Null
    Start-ScheduledTask -TaskName $Name
    $again = "Stop-ScheduledTask -TaskName $Name; Start-ScheduledTask -TaskName $Name"
}
else {
    & $Nssm install $Name $Python $arguments
    & $Nssm set $Name AppDirectory $folder
    & $Nssm set $Name ObjectName $Account
    & $Nssm set $Name Start SERVICE_DELAYED_AUTO_START
    & $Nssm set $Name AppExit Default Restart
    & $Nssm set $Name AppExit 2 Exit          # the configuration is wrong: starting again does not mend it
    & $Nssm set $Name AppExit 4 Exit          # a model or plugin likewise
    & $Nssm set $Name AppExit 10 Exit         # the password is refused: trying again would lock the account
    & $Nssm set $Name AppRestartDelay 5000
    & $Nssm set $Name AppStopMethodConsole 20000   # Ctrl-C, and time to say "stopped" in the nodes
    & $Nssm set $Name AppStderr (Join-Path $folder "service.log")
    & $Nssm set $Name AppRotateFiles 1
    & $Nssm set $Name AppRotateBytes 10000000
    icacls $folder /grant "${Account}:(OI)(CI)M" | Out-Null
    & $Nssm start $Name
    $again = "Restart-Service -Name $Name -Force"
}

if ($WithWatchdog) {
    $ask = "try { Invoke-WebRequest -UseBasicParsing -TimeoutSec 10 $Health | Out-Null } catch { $again }"
    $action = New-ScheduledTaskAction -Execute "powershell.exe" -Argument "-NoProfile -Command `"$ask`""
    $trigger = New-ScheduledTaskTrigger -Once -At ((Get-Date).AddMinutes(5)) -RepetitionInterval (New-TimeSpan -Minutes 1)
    $user = New-ScheduledTaskPrincipal -UserId "SYSTEM" -LogonType ServiceAccount -RunLevel Highest
    Register-ScheduledTask -TaskName "$Name watchdog" -Action $action -Trigger $trigger -Principal $user
}
