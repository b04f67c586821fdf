document.querySelectorAll("table.sorts thead th").forEach((th,n)=>{const b=document.createElement("button");
b.textContent=th.textContent;th.replaceChildren(b);let up=1;b.onclick=()=>{th.closest("table").querySelectorAll("tbody")
.forEach(body=>{const rows=[...body.rows].filter(r=>!r.classList.contains("group"));const of=r=>{const c=r.cells[
th.cellIndex],d=c.querySelector("data");return d?+d.value:c.textContent};rows.sort((p,q)=>{const a=of(p),b=of(q);
return(a>b?1:a<b?-1:0)*up}).forEach(r=>body.append(r))});up=-up}})
